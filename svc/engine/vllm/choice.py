"""One option of an engine's launch: its value and its origin."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from svc.engine.vllm.engine_args import given

AUTO = "auto"
"""Value of a choice that vLLM makes."""


class Origin(StrEnum):
    """Source that determined a choice."""

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
    """The value of one option of an engine's launch.

    Attributes:
        name: vLLM's name for the option, if it has one.
        reason: reason for the value, in a few words; empty if the origin says enough.
        arguments: arguments to add to vLLM's command line; empty if the user gave them, or if vLLM chooses.
        variables: variables to add to vLLM's environment.
    """

    name: str
    value: Value
    origin: Origin
    reason: str = ""
    arguments: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


def as_argument(name: str, value: Value, origin: Origin, reason: str = "") -> Choice:
    """Return a choice that is passed to vLLM under its own name."""
    return Choice(name, value, origin, reason, (_option(name), str(value)))


def as_given(name: str, args: Sequence[str], *others: str) -> Choice | None:
    """Return an option and its value from `engine.args`; None if they do not contain the option.

    Args:
        others: other names of the option, with their dashes.
    """
    value = given(args, _option(name), *others)
    return None if value is None else Choice(name, as_number(value), Origin.ARGS)


def as_number(text: str) -> int | float | str:
    """Return a text as a number if it is one, else the text; vLLM also accepts `4k`."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
