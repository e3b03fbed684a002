"""One choice for the launch of an engine: its value and its origin."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from svc.engine.vllm.engine_args import given

AUTO = "auto"
"""Left to vLLM."""


class Origin(StrEnum):
    """Origin of a choice."""

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
    """One choice.

    Attributes:
        name: vLLM's name for it, if it has one.
        reason: in a few words; empty if the origin is enough.
        arguments: for vLLM's command line; empty if the user gave them, or if vLLM chooses.
        variables: for its environment.
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
    """Return the choice that `engine.args` contain; None without one.

    Args:
        others: additional names of its option.
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
