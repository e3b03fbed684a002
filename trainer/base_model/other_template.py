"""Replaces a base model's chat template, in a new folder that links to the base's other files.

All later stages see an ordinary base with this template.
"""

import hashlib
import json
from pathlib import Path

from svc.model_folder.chat_template import TEMPLATE_KWARGS_FILE
from trainer.base_model.cached_folder import changed_folder
from trainer.base_model.checks import read_json
from trainer.base_model.content import TEMPLATE_FILE

_TOKENIZER_CONFIG = "tokenizer_config.json"
_OLD_TEMPLATE = (TEMPLATE_FILE, "chat_template.json", TEMPLATE_KWARGS_FILE)
"""Files that contain the base's own chat template or the template's arguments. The new folder does not link to them."""


def revision_with_template(revision: str, template: str) -> str:
    """Return the revision of a base with a replaced chat template: the base's revision plus the template's
    hash.
    """
    return f"{revision}+template:{hashlib.sha256(template.encode()).hexdigest()}"


def folder_with_template(folder: Path, template: str, cache: Path) -> Path:
    """Return a cache folder that links to a model's files but contains the given chat template instead of the model's.

    Args:
        cache: folder for converted models; any number of processes may share it.
    """
    texts = {TEMPLATE_FILE: template}
    if (folder / _TOKENIZER_CONFIG).is_file():
        config = read_json(folder / _TOKENIZER_CONFIG)
        config.pop("chat_template", None)
        texts[_TOKENIZER_CONFIG] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return changed_folder(folder, texts, cache / "chat_templates", _OLD_TEMPLATE)
