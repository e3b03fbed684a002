"""Builds base models without a chat template, such as Llama 2 and Phi-2, in the form published on the hub."""

import json
import shutil
from pathlib import Path

from tests.hub_models.build import build_hub_model
from tests.hub_models.family import FAMILIES
from tests.hub_models.tokenizer import fetched_tokenizer, write_tokenizer

_CONFIG = "tokenizer_config.json"


def write_base_tokenizer(folder: Path, family: str) -> Path:
    """Write a family's tokenizer, the real one if fetched, with the published config except for the template."""
    fixture, fetched = FAMILIES[family], fetched_tokenizer(FAMILIES[family])
    folder.mkdir(parents=True)
    for name, text in fixture.texts.items():
        (folder / name).write_text(text, "utf-8")
    if fetched:
        shutil.copyfile(fetched / "tokenizer.json", folder / "tokenizer.json")
    else:
        write_tokenizer(folder, fixture)
    return without_template(folder)


def build_base_model(folder: Path, family: str) -> Path:
    """Write a base model of a family with small random weights and no chat template."""
    return without_template(build_hub_model(folder, family, tokenizer=fetched_tokenizer(FAMILIES[family])))


def without_template(folder: Path) -> Path:
    """Remove the chat template from a model folder and return the folder."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / _CONFIG).read_text("utf-8"))
    config.pop("chat_template", None)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2), "utf-8")
    return folder
