"""A launch option of an engine: its value, and where the value came from."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from svc.engine.vllm.user_args import given

AUTO = "auto"
"""Option value that leaves the choice to vLLM."""


class Origin(StrEnum):
    """Source of an option's value."""

    ARGS = "engine.args"
    SETTING = "setting"
    ENVIRONMENT = "environment"
    MACHINE = "machine"
    MODEL = "model"
    DEFAULT = "default"
    VLLM = "vLLM's default"


Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Choice:
    """A launch option of an engine, and its value.

    Attributes:
        name: vLLM's name for the option, or our own name if vLLM has none.
        reason: short reason for the value; empty if the origin explains it.
        arguments: arguments to add to vLLM's command line; empty if the user has already passed them, or if the
            choice is left to vLLM.
        variables: variables to add to vLLM's environment.
    """

    name: str
    value: Value
    origin: Origin
    reason: str = ""
    arguments: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


def as_argument(name: str, value: Value, origin: Origin, reason: str = "") -> Choice:
    """Return a launch option that is passed to vLLM as the command-line option of the same name."""
    return Choice(name, value, origin, reason, (_option(name), str(value)))


def as_given(name: str, args: Sequence[str], *others: str) -> Choice | None:
    """Return an option and its value from `engine.args`, or None if `engine.args` does not contain the option.

    Args:
        others: other names of the option, including the leading dashes.
    """
    value = given(args, _option(name), *others)
    return None if value is None else Choice(name, as_number(value), Origin.ARGS)


def as_number(text: str) -> int | float | str:
    """Convert a string to a number if possible. Return other strings unchanged, because vLLM also accepts values such
    as `4k`.
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
