"""Extra chat template arguments, which must be the same in training, evaluation and serving.

Templates of thinking models insert a thinking block into the prompt, or into the last answer, unless thinking is
disabled. Other templates insert today's date. A model used with different arguments than in training gives wrong
answers, without any other symptom.
"""

import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from svc.files.disk import write_whole
from svc.files.json_file import read_json_object

TEMPLATE_KWARGS_FILE = "chat_template_kwargs.json"
"""File in a served model's folder that stores the chat template arguments. The file is absent if there are none."""

_DATE = date(2024, 7, 26)
"""Date that Llama's chat templates fall back to when the current date is not available."""
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

TemplateValue = bool | int | float | str
TemplateKwargs = Mapping[str, TemplateValue]

_DEFAULTS: dict[str, TemplateValue] = {
    "enable_thinking": False,
    "date_string": f"{_DATE:%d %b %Y}",
}
"""Default chat template arguments: no thinking, and a fixed date. Each is passed only to templates that
contain its name."""


def choose_template_kwargs(folder: Path, given: TemplateKwargs | None) -> dict[str, TemplateValue]:
    """Return the chat template arguments: the recipe's, or else those stored with the model, or else the
    defaults.

    Args:
        folder: folder of the model to be trained.
        given: arguments from the recipe, or None if the recipe sets none.

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
    """Return the template with a fixed date in place of today's date.

    If a template has an argument that sets the date, the template is returned unchanged. Some templates, such as
    SmolLM3's, have no such argument.

    Without a fixed date, a version would be trained with one prompt and used with a different prompt every day.
    """
    if "date_string" in template:
        return template
    return _TODAY.sub(lambda match: json.dumps(_DATE.strftime(match[2])), template)


def read_chat_template(folder: Path) -> str | None:
    """Return a model folder's chat template, or None if it has no template or several named templates."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    try:
        template = json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return template if isinstance(template, str) else None


def read_template_kwargs(folder: Path) -> dict[str, TemplateValue]:
    """Return the chat template arguments stored in a model folder, or an empty dict if none are stored.

    Raises:
        IntegrityError: the file with the arguments is damaged.
    """
    return read_json_object(folder / TEMPLATE_KWARGS_FILE, default={})


def write_template_kwargs(folder: Path, kwargs: TemplateKwargs) -> None:
    """Write chat template arguments to a model folder. No file is written if there are none."""
    if kwargs:
        write_whole(folder / TEMPLATE_KWARGS_FILE, json.dumps(dict(kwargs), sort_keys=True).encode("utf-8"))
