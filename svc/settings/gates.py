"""Settings of the gates that a version must pass before it is promoted."""

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, model_validator

from svc.settings.section import AbsolutePath, Section


class UndecidedGates(StrEnum):
    """Action that a promotion takes when a gate is undecided."""

    ALLOW = "allow"
    REFUSE = "refuse"


class _CustomGate(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")
    """Name of the gate."""


class _RunGate(_CustomGate):
    timeout_s: float = Field(60.0, gt=0, le=600)
    """Maximum duration in seconds, after which the gate counts as failed."""


class CommandGate(_RunGate):
    """A gate that runs a command without a shell: exit code 0 passes, 1 fails."""

    command: tuple[str, ...] = Field(min_length=1)
    """Program and arguments."""


class EntryPointGate(_RunGate):
    """A gate that calls a Python function in a separate process."""

    entry_point: str = Field(pattern=r"^\w+(\.\w+)*:\w+$")
    """`MODULE:FUNCTION`."""


class ResultFileGate(_CustomGate):
    """A gate that reads results exported by Promptfoo or OpenAI Evals."""

    result_file: AbsolutePath
    """File exported by Promptfoo or OpenAI Evals; `{version}` in the path is replaced with NAME@N."""
    min_pass_share: float = Field(ge=0, le=1)
    """Minimum share of passed tests."""


_GATE_KINDS: dict[str, type[_CustomGate]] = {
    "command": CommandGate,
    "entry_point": EntryPointGate,
    "result_file": ResultFileGate,
}


def _gate_kind(value: Any) -> str | None:
    if isinstance(value, dict):
        return next((kind for kind in _GATE_KINDS if kind in value), None)
    return next((kind for kind, model in _GATE_KINDS.items() if isinstance(value, model)), None)


CustomGate = Annotated[
    Annotated[CommandGate, Tag("command")]
    | Annotated[EntryPointGate, Tag("entry_point")]
    | Annotated[ResultFileGate, Tag("result_file")],
    Discriminator(
        _gate_kind,
        custom_error_type="gate_kind",
        custom_error_message="a gate must have one of the keys command, entry_point and result_file",
    ),
]


class GateSettings(Section):
    """Gates that a version must pass before it is promoted.

    A margin is the largest amount by which the version may be worse than the version in production. Without a margin,
    the difference is only shown.
    """

    quality_margin: float | None = Field(0.02, ge=0)
    """Largest amount by which the primary metric may be worse than production's on the same held-out examples; for a
    metric that is not a share, a fraction of production's value."""
    nll_margin: float | None = Field(0.05, ge=0)
    """Largest allowed increase in the NLL of the held-out references, relative to production's NLL."""
    forgetting_margin: float | None = Field(None, ge=0, le=1)
    """Largest allowed drop in accuracy on general questions compared with the base model."""
    speed_margin: float | None = Field(0.2, ge=0)
    """Largest allowed slowdown in tokens per second and in time to first token: 0.2 allows 20%."""
    max_age_days: float | None = Field(None, gt=0)
    """Maximum age of a version and of its training data, in days."""
    undecided: UndecidedGates = UndecidedGates.ALLOW
    """`allow`: promote with a warning if a gate is undecided; `refuse`: treat an undecided gate as failed."""
    custom: tuple[CustomGate, ...] = Field((), max_length=50)
    """Additional gates, see docs/rollouts.md."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [gate.name for gate in self.custom]
        if len(set(names)) < len(names):
            raise ValueError("custom gates must have different names")
        return self
