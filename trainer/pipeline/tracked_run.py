"""The MLflow run of a folder: created once, so that a resumed run continues it."""

import json
from collections.abc import Callable
from pathlib import Path

from svc.files.disk import write_whole
from svc.files.json_file import read_json_object


def tracked_run(path: Path, start: Callable[[], str]) -> str:
    """Return the id of a folder's MLflow run.

    Args:
        path: the folder's `mlflow.json`.
        start: starts a run if the folder has none, and returns its id.

    Raises:
        IntegrityError: the file is damaged.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"run_id": start()}).encode("utf-8"))
    return str(read_json_object(path)["run_id"])
