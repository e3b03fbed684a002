"""One settings object for all packages, merged in the order defaults < svc.yaml < `SVC_*` environment <
flags.

An unknown key is an error in every source, because a misspelled setting would otherwise be silently ignored. Recipe
keys (trainer/recipe/) are not settings: settings belong to a machine, recipes to a model.
"""

import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource
from pydantic_settings import SettingsError as SourceError

from svc.errors import SettingsError
from svc.files.yaml_text import parse_yaml
from svc.settings.dotted_keys import dotted_keys
from svc.settings.settings import ENV_PREFIX, Settings

DEFAULT_FILE = Path("svc.yaml")
_PASSWORD = re.compile(r"//\S*@")
"""Matches the user and password in a rejected URL, which must not appear in the error message."""


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """Load the settings from all sources.

    Args:
        config: a YAML file; defaults to `svc.yaml` in the working directory, if it exists.
        flags: values from the command line, as `section={key: value}` or `key=value`; `None` means not
            given.

    Raises:
        SettingsError: a key is unknown, a value is invalid, or the file cannot be read.
    """
    _check_environment()
    try:
        given = {key: value for key, value in flags.items() if value is not None}
        return Settings(**_merge(_merge(_read_file(config), _read_environment()), given))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        is_secret = first["loc"][:1] in (("store",), ("artifacts",))
        shown = "invalid" if is_secret else _PASSWORD.sub("//***@", repr(first["input"]))
        raise SettingsError(
            f"setting {key!r} is {shown}: {first['msg']}",
            todo="see docs/configuration.md for every setting and its type",
        ) from error


def _read_file(config: Path | None) -> dict[str, Any]:
    path = config or DEFAULT_FILE
    if config is None and not path.is_file():
        return {}
    try:
        content = parse_yaml(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"cannot read settings from {path}: {error}", expected="a YAML file encoded in UTF-8"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must contain a YAML mapping of settings, got {type(content).__name__}")
    for key in content:
        if not isinstance(key, str):
            raise SettingsError(f"{path} has a key that is not a string: {key!r}", expected="setting names as keys")
    return content


def _read_environment() -> dict[str, Any]:
    try:
        return EnvSettingsSource(Settings)()
    except SourceError as error:
        raise SettingsError(
            f"cannot read the environment variables: {error}: {error.__cause__}",
            expected='JSON for a list or a section, for example SVC_ENGINE__ARGS=\'["--seed", "1"]\'',
        ) from error


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def setting_keys() -> list[str]:
    """Return every configurable key, as `section.key`."""
    return dotted_keys(Settings)


def environment_without_store() -> dict[str, str]:
    """Return this process's environment without the URL of the store, for child processes that do not need its
    password.
    """
    secret = (_variable("store"), _variable("store.url"))
    return {name: value for name, value in os.environ.items() if name.upper() not in secret}


def _check_environment() -> None:
    """Raise SettingsError if an unknown `SVC_*` variable is set, since pydantic-settings would ignore it."""
    known = {_variable(key) for key in [*setting_keys(), *Settings.model_fields]}
    for name in os.environ:
        if name.startswith(ENV_PREFIX) and name.upper() not in known:
            raise SettingsError(
                f"the environment variable {name} does not match any setting",
                expected=f"one of {', '.join(sorted(known))}",
                todo=f"unset {name} or correct its name",
            )


def _variable(key: str) -> str:
    return ENV_PREFIX + key.upper().replace(".", "__")
