"""Settings of rollouts."""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from svc.settings.section import Section


class AtDeadline(StrEnum):
    """Action that a rollout takes when a step reaches its deadline without a decision."""

    HOLD = "hold"
    ROLLBACK = "rollback"


class UnitKind(StrEnum):
    """The unit of traffic that a canary assigns to one version and counts as one observation."""

    AUTO = "auto"
    """Assign by the request's `user` if there is one, otherwise by its conversation, otherwise by the request
    itself."""
    REQUEST = "request"


class RolloutSettings(Section):
    """Steps and limits of a gradual promotion, for example `svc promote NAME@N --shadow 200 --canary 5,25,100`.

    A margin is how much worse the candidate may be than production during the same period.
    """

    shadow: int = Field(0, ge=0, le=100_000)
    """Number of copies of clients' requests that the candidate must answer before it serves clients; 0 disables this
    step."""
    canary: tuple[float, ...] = Field((), max_length=20)
    """Shares of clients that the candidate serves, in percent, ending with 100."""
    min_units: int = Field(50, ge=1)
    """Minimum number of users or conversations that the candidate serves in each canary step."""
    max_step_s: float = Field(86_400.0, gt=0)
    """Time limit for each step, in seconds."""
    at_deadline: AtDeadline = AtDeadline.ROLLBACK
    """Action at the deadline; `rollback`: return all clients to production; `hold`: stay at the step until the result
    is conclusive or an operator acts."""
    unit: UnitKind = UnitKind.AUTO
    """Unit that counts as one observation; `auto`: the `user` field, or else the conversation, or else the request;
    `request`: each request on its own."""
    max_errors: float = Field(0.01, gt=0, lt=1)
    """Largest allowed increase in the share of failed requests compared with production."""
    max_invalid: float = Field(0.01, gt=0, lt=1)
    """Largest allowed increase in the share of answers that are not valid JSON."""
    max_slowdown: float = Field(1.2, gt=1)
    """Largest allowed time to the first token relative to production's: 1.2 allows 20% more."""
    max_negative: float = Field(0.05, gt=0, lt=1)
    """Largest allowed increase in the share of negative feedback."""

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        steps = self.canary
        if steps and (list(steps) != sorted(set(steps)) or steps[0] <= 0 or steps[-1] != 100):
            raise ValueError(
                "canary steps must be increasing percentages above 0 that end with 100, for example 5,25,100"
            )
        return self

    @property
    def is_gradual(self) -> bool:
        """Whether the promotion has at least one shadow or canary step."""
        return bool(self.shadow or self.canary)
