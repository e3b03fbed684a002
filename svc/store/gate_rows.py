"""Results of a promotion's gates, in the form in which they are stored with the promotion and shown to
users.
"""

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter


class GateVerdict(StrEnum):
    """Result of one gate."""

    PASSED = "passed"
    FAILED = "failed"
    UNDECIDED = "undecided"
    """The gate applies, but there is not enough data to decide whether it passes."""
    SKIPPED = "skipped"
    """The gate does not apply, or has no limit."""


class GateRow(BaseModel):
    """Result of one gate in a promotion.

    Attributes:
        gate: name of the gate.
        measured: the measured values, as text; empty if nothing was measured.
        limit: the allowed values, as text; empty if there is no limit.
        reason: reason for the verdict; empty if `measured` and `limit` explain it.
    """

    model_config = ConfigDict(frozen=True)

    gate: str
    measured: str = ""
    limit: str = ""
    verdict: GateVerdict
    reason: str = ""

    def __str__(self) -> str:
        limit = f"limit: {self.limit}" if self.limit else ""
        figures = ", ".join(text for text in (self.measured, limit) if text)
        return ": ".join(text for text in (self.gate, figures, self.verdict.value, self.reason) if text)


GATE_ROWS = TypeAdapter(tuple[GateRow, ...])
"""Converts a promotion's gate results to JSON and back."""


def gate_details(gates: tuple[GateRow, ...]) -> dict[str, Any]:
    """Return the gate results in the form in which a promotion's audit event records them. The result is empty if there
    are no gates.
    """
    return {"gates": GATE_ROWS.dump_python(gates, mode="json")} if gates else {}
