"""A gate's verdict on a loss of quality: within the allowed margin, beyond it, or undecided.

With few examples, a gate that rejects only a proven loss would pass a bad version: losing 12 of 27 right answers in a
set of 60 questions does not prove a loss of more than 0.1. A pass must therefore be proven too. The third outcome,
`undecided`, comes with the number of examples needed for a decision.
"""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from svc.evaluation.intervals import Interval
from svc.sample_size import Z_INTERVAL, about, detectable_loss, examples_needed
from svc.version import Format

_MAX_EXAMPLES = 1_000_000
"""Largest number of examples to recommend. Larger sets are impractical."""
_ROUNDING = 1e-9  # 0.745 - 0.695 is slightly more than 0.05 in floating point


class GateOutcome(StrEnum):
    """Outcome of a gate, determined by where the quality loss's confidence interval lies relative to the margin."""

    PASSED = "passed"
    """The confidence interval rules out that the model is worse by more than the margin."""
    FAILED = "failed"
    """The confidence interval proves that the model is worse by more than the margin."""
    UNDECIDED = "undecided"


class Gate(StrEnum):
    """The kinds of quality loss that a recipe can limit. Each value is the key of the limit in the recipe's `evaluate`
    section. Limits with `gptq` in their names apply to every quantized format.
    """

    GPTQ_LOSS = "max_gptq_loss"
    GPTQ_NLL = "max_gptq_nll"
    FORGETTING = "max_forgetting"

    @property
    def counted(self) -> str:
        """Noun for the items that the gate counts, for use in messages."""
        return "questions" if self is Gate.FORGETTING else "examples"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Verdict(_Record):
    """Result of comparing a loss of quality with the allowed margin.

    Attributes:
        loss: how much worse the second model is, with its 95% interval; negative if it is better.
        detectable: smallest distance between the loss and the margin that this number of examples can detect
            with 80% power.
        examples_to_decide: approximate number of examples for 80% power if the loss stays the same; None if the outcome
            is decided, or if the loss is so close to the margin that more than a million would be needed.
    """

    outcome: GateOutcome
    loss: Interval
    margin: float
    examples: int
    detectable: float
    examples_to_decide: int | None

    def reason(self, counted: str = "examples") -> str:
        """Return the reason for the outcome as text. `counted` is the noun to use for the examples."""
        number = f"{self.examples} {counted}"
        match self.outcome:
            case GateOutcome.PASSED:
                return f"a larger loss is excluded with {number}"
            case GateOutcome.FAILED:
                return f"a loss of {self.loss.low:.3f} or more is proven with {number}"
            case GateOutcome.UNDECIDED:
                more = self.examples_to_decide
                decide = f"about {about(more)} would decide" if more else "the loss is too near to the limit"
                between = self.loss.low <= self.margin < self.loss.high
                possible = f"a loss of up to {self.loss.high:.3f} cannot be excluded with {number}"
                return f"{possible if between else f'{number} are too few'}; {decide}"


class GateReport(_Record):
    """Verdict of one gate on a version.

    Attributes:
        measured: text that describes the change and states the values before and after.
        limit: text with the recipe's key for the margin and, for a relative margin, the value that it is relative to.
        format: the format whose loss was measured, or None in versions from releases that supported only GPTQ.
    """

    gate: Gate
    measured: str
    limit: str
    verdict: Verdict
    format: Format | None = None

    def __str__(self) -> str:
        verdict = self.verdict
        allowed = f"at most {verdict.margin:.3f} ({self.limit})"
        reason = verdict.reason(self.gate.counted)
        return f"{self.measured}, loss {verdict.loss}, {allowed}: {verdict.outcome}: {reason}"


def verdict_of(loss: Interval, margin: float, examples: int, *, fewest: int = 1) -> Verdict:
    """Return the verdict on whether a loss of quality is within the allowed margin.

    The number of examples needed for a decision is computed with the normal approximation in
    svc.sample_size. Its inputs are the distance between the loss and the margin, and the variance implied by
    the interval's width.

    Args:
        loss: paired difference; above 0 if the second model is worse.
        margin: maximum allowed loss.
        examples: number of examples that both models answered, at least 1.
        fewest: minimum number of examples for a decision, because a bootstrap interval over very few examples is too
            narrow.
    """
    if examples < fewest:
        outcome = GateOutcome.UNDECIDED
    elif loss.low > margin + _ROUNDING:
        outcome = GateOutcome.FAILED
    elif loss.high <= margin + _ROUNDING:
        outcome = GateOutcome.PASSED
    else:
        outcome = GateOutcome.UNDECIDED
    variance = examples * ((loss.high - loss.low) / (2 * Z_INTERVAL)) ** 2
    distance = abs(loss.value - margin)
    more = None
    if outcome is GateOutcome.UNDECIDED and distance > _ROUNDING:
        needed = max(fewest, examples + 1, examples_needed(distance, variance))
        more = needed if needed <= _MAX_EXAMPLES else None
    return Verdict(
        outcome=outcome,
        loss=loss,
        margin=margin,
        examples=examples,
        detectable=detectable_loss(examples, variance),
        examples_to_decide=more,
    )
