"""Replaces a base's chat template: a new folder has the template, and links to the base's other files.

All later stages see an ordinary base with this template.
"""

import hashlib
import json
from functools import partial
from pathlib import Path

from svc.model_folder.chat_template import TEMPLATE_KWARGS_FILE
from trainer.base_model.cached_folder import build_once
from trainer.base_model.checks import read_json
from trainer.base_model.content import TEMPLATE_FILE

_TOKENIZER_CONFIG = "tokenizer_config.json"
_OLD_TEMPLATE = (TEMPLATE_FILE, "chat_template.json", TEMPLATE_KWARGS_FILE)
"""Files of the base's own template, and of its arguments."""


def revision_with_template(revision: str, template: str) -> str:
    """Return the revision of a base whose chat template was replaced by this text; it names both."""
    return f"{revision}+template:{hashlib.sha256(template.encode()).hexdigest()}"


def folder_with_template(folder: Path, template: str, cache: Path) -> Path:
    """Return a folder of the cache with links to a model's files, and this chat template in place of the model's own.

    The folder is named by its content, so it is built again if the model has more files than before, or has moved.

    Args:
        cache: folder for converted models; any number of processes may share it.
    """
    folder = folder.absolute()
    texts = {TEMPLATE_FILE: template}
    if (folder / _TOKENIZER_CONFIG).is_file():
        config = read_json(folder / _TOKENIZER_CONFIG)
        config.pop("chat_template", None)
        texts[_TOKENIZER_CONFIG] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    links = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in (*_OLD_TEMPLATE, *texts))
    digest = hashlib.sha256(json.dumps([texts, [str(link) for link in links]]).encode()).hexdigest()
    return build_once(cache / "chat_templates" / digest[:32], partial(_write, texts, links))


def _write(texts: dict[str, str], links: list[Path], out: Path) -> None:
    for name, text in texts.items():
        (out / name).write_text(text, "utf-8")
    for link in links:
        (out / link.name).symlink_to(link)
