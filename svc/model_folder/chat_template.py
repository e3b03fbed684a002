"""Arguments of a chat template besides the conversation, the same in training, evaluation and serving.

Templates of thinking models insert a thinking block into a prompt, or into the last answer, unless it is disabled;
others insert today's date. A model that was trained with one setting and is used with another answers wrongly, without
any other symptom.
"""

import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from svc.files.disk import write_whole
from svc.files.json_file import read_json_object

TEMPLATE_KWARGS_FILE = "chat_template_kwargs.json"
"""In a served model's folder; missing without arguments."""

_DATE = date(2024, 7, 26)
"""Date that Llama's templates use if the current date is unavailable."""
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

TemplateValue = bool | int | float | str
TemplateKwargs = Mapping[str, TemplateValue]

_DEFAULTS: dict[str, TemplateValue] = {
    "enable_thinking": False,
    "date_string": f"{_DATE:%d %b %Y}",
}
"""Passed to a template that contains the name, so that a prompt is the same on every day."""


def choose_template_kwargs(folder: Path, given: TemplateKwargs | None) -> dict[str, TemplateValue]:
    """Return the arguments of a model's template: the recipe's, else those stored with the model, else the defaults.

    Args:
        folder: of the model to train.
        given: the recipe's; None if it has none.

    Raises:
        IntegrityError: see `read_template_kwargs`.
    """
    if given is not None:
        return dict(given)
    if (folder / TEMPLATE_KWARGS_FILE).is_file():
        return read_template_kwargs(folder)
    template = read_chat_template(folder) or ""
    return {name: value for name, value in _DEFAULTS.items() if name in template}


def pin_date(template: str) -> str:
    """Return a template with a fixed date instead of today's, if it has no argument for it, as SmolLM3's.

    Otherwise a version would be trained with one prompt, and used with another on each day.
    """
    if "date_string" in template:
        return template
    return _TODAY.sub(lambda match: json.dumps(_DATE.strftime(match[2])), template)


def read_chat_template(folder: Path) -> str | None:
    """Return the template of a model folder; None if it has none, or several by name."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    try:
        template = json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return template if isinstance(template, str) else None


def read_template_kwargs(folder: Path) -> dict[str, TemplateValue]:
    """Return the stored arguments of a model folder's template.

    Raises:
        IntegrityError: the file is damaged.
    """
    return read_json_object(folder / TEMPLATE_KWARGS_FILE, default={})


def write_template_kwargs(folder: Path, kwargs: TemplateKwargs) -> None:
    """Write the file, if there are arguments."""
    if kwargs:
        write_whole(folder / TEMPLATE_KWARGS_FILE, json.dumps(dict(kwargs), sort_keys=True).encode("utf-8"))
