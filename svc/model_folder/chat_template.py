"""What a chat template is given beside the conversation, the same in training, in evaluation and in serving.

Templates of thinking models write a thinking block into a prompt, or into the last answer, unless they are told not to;
others write today's date. A model that learnt its answers with one setting and is asked with another answers wrongly,
and nothing else shows it.
"""

import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from svc.files.disk import write_whole
from svc.files.json_file import read_json_object

TEMPLATE_KWARGS_FILE = "chat_template_kwargs.json"
"""In a served model's folder; none where the template is given nothing."""

_DATE = date(2024, 7, 26)
"""What Llama's templates take where they cannot know the date."""
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

TemplateValue = bool | int | float | str
TemplateKwargs = Mapping[str, TemplateValue]

_DEFAULTS: dict[str, TemplateValue] = {
    "enable_thinking": False,
    "date_string": f"{_DATE:%d %b %Y}",
}
"""Given to a template in which the word stands, and with which a prompt is the same on every day."""


def choose_template_kwargs(folder: Path, given: TemplateKwargs | None) -> dict[str, TemplateValue]:
    """What to give a model's template: what a recipe says, else what it was given before, else the defaults.

    Args:
        folder: of the model that will be trained.
        given: the recipe's; None where it says nothing.

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
    """A template with a fixed date in place of today's, where it takes none that it is given, as SmolLM3's.

    Else a version would be trained with one prompt, and asked with another on each day.
    """
    if "date_string" in template:
        return template
    return _TODAY.sub(lambda found: json.dumps(_DATE.strftime(found[2])), template)


def read_chat_template(folder: Path) -> str | None:
    """The template of a model folder; None where it has none, or several by name."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    try:
        template = json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return template if isinstance(template, str) else None


def read_template_kwargs(folder: Path) -> dict[str, TemplateValue]:
    """What the template of a model folder is given.

    Raises:
        IntegrityError: the file is damaged.
    """
    return read_json_object(folder / TEMPLATE_KWARGS_FILE, default={})


def write_template_kwargs(folder: Path, kwargs: TemplateKwargs) -> None:
    """Writes the file, where there is anything to write."""
    if kwargs:
        write_whole(folder / TEMPLATE_KWARGS_FILE, json.dumps(dict(kwargs), sort_keys=True).encode("utf-8"))
