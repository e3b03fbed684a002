"""One choice of how an engine is started: its value, and where that came from."""

from dataclasses import dataclass
from enum import StrEnum

AUTO = "auto"
"""Left to vLLM."""


class Origin(StrEnum):
    """Where a choice came from."""

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
        name: vLLM's name for it, where it has one.
        reason: in a few words; empty where the origin says it all.
        arguments: for vLLM's command line; none where it was given there already, or is vLLM's own choice.
        variables: for its environment.
    """

    name: str
    value: Value
    origin: Origin
    reason: str = ""
    arguments: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


def as_argument(choice: Choice) -> Choice:
    """The choice, passed to vLLM under its own name."""
    option = f"--{choice.name.replace('_', '-')}"
    return Choice(choice.name, choice.value, choice.origin, choice.reason, (option, str(choice.value)))
