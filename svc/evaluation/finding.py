"""Findings of a diagnosis: the fault, its numbers, the rule, and the key to change."""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class FindingKind(StrEnum):
    """Faults of a training run. docs/diagnosis.md has the rule of each; a test compares."""

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
        """Name for people."""
        return self.value.replace("_", " ")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Advice(_Record):
    """A change to try.

    Attributes:
        key: of the recipe, dotted.
        before: its value in the run; empty if it has none.
        value: to try.
    """

    key: str
    before: str = ""
    value: str

    def __str__(self) -> str:
        return f"{self.key} from {self.before} to {self.value}" if self.before else f"{self.key}: {self.value}"


class Finding(_Record):
    """One fault.

    Attributes:
        what: a sentence with the numbers.
        advice: the change to try first.
        rule: that detected it.
    """

    kind: FindingKind
    what: str
    advice: Advice
    rule: str
