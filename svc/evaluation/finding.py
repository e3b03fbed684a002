"""Findings of a diagnosis.

Each finding states a fault with the measured values, the rule that detected it, and the recipe change to try.
"""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class FindingKind(StrEnum):
    """Kind of fault in a training run. A test checks that docs/diagnosis.md states the rule for each kind."""

    DIVERGENCE = "divergence"
    LEARNING_RATE_HIGH = "learning_rate_high"
    LEARNING_RATE_LOW = "learning_rate_low"
    UNDERFITTING = "underfitting"
    OVERFITTING = "overfitting"
    TOO_LITTLE_DATA = "too_little_data"
    LABEL_NOISE = "label_noise"
    FORGETTING = "forgetting"
    HELDOUT_TOO_SMALL = "heldout_too_small"
    ANSWERS_CUT_OFF = "answers_cut_off"

    @property
    def words(self) -> str:
        """Return the name of the finding kind for display."""
        return self.value.replace("_", " ")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Advice(_Record):
    """A recipe change that is worth trying.

    Attributes:
        key: key in the recipe, in dotted form.
        before: value that the run used; empty if the key was not set.
        value: value to try.
    """

    key: str
    before: str = ""
    value: str

    def __str__(self) -> str:
        return f"{self.key} from {self.before} to {self.value}" if self.before else f"{self.key}: {self.value}"


class Finding(_Record):
    """A fault found in a training run.

    Attributes:
        what: a sentence that describes the fault, including the measured values.
        advice: the recipe change to try first.
        rule: the rule that detected the fault.
    """

    kind: FindingKind
    what: str
    advice: Advice
    rule: str
