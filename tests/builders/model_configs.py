"""Changes the configuration of a model's folder."""

import json
from pathlib import Path


def change_config(folder: Path, **changes: object) -> None:
    """Change fields in the `config.json` of a model's folder."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")
