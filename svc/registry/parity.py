"""A version's parity report: checks that the served model equals the trained model.

The report is created once, before registration, by testing the files to be registered on an engine that
serves them. This module does not know how parity is measured (see trainer/evaluation/parity) or displayed.
"""

import math
from statistics import fmean

from pydantic import BaseModel, ConfigDict, Field

from svc.evaluation.intervals import Interval
from svc.version import Format


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParityCheck(_Record):
    """Result of one check in a parity report.

    Attributes:
        name: name of the property that is compared.
        found: the property's actual value.
        expected: the required value or limit.
    """

    name: str
    passed: bool
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.name}: {self.found}, expected {self.expected}"


class Differences(_Record):
    """Differences between two models' scores for the same tokens. Each token is scored given all preceding tokens.

    Attributes:
        nats: for each example and token, the second model's log-probability minus the first's.
        agreement: share of positions at which both models have the same top-1 token.
        diverges_at: example and position of the first difference in the top-1 token, or None if there is none.
    """

    nats: tuple[tuple[float, ...], ...]
    agreement: float = Field(ge=0, le=1)
    diverges_at: tuple[int, int] | None

    @property
    def all(self) -> list[float]:
        """The values of `nats` for all tokens, as one flat list."""
        return [difference for example in self.nats for difference in example]

    @property
    def mean(self) -> float:
        """Mean absolute difference, in nats per token."""
        return fmean(map(abs, self.all))

    @property
    def largest(self) -> float:
        """Largest absolute difference, in nats."""
        return max(map(abs, self.all))

    @property
    def shift(self) -> float:
        """Increase in the negative log-likelihood from the first model to the second, in nats per token."""
        return -math.fsum(self.all) / len(self.all)


class Speed(_Record):
    """Speed of one format on the engine. Each value is measured several times.

    Attributes:
        load_seconds: time for an in-place reload, in seconds. None for a model that only a new engine can
            load.
        first_token_seconds: time to first token for an uncached prompt, in seconds, with no other requests running.
        tokens_per_second: tokens decoded per second, keyed by the number of concurrent streams.
        memory_bytes: memory of the engine's processes, or None if unknown.
        others_share: share of the machine's CPU time that other processes used during the measurement.
    """

    load_seconds: Interval | None
    first_token_seconds: Interval
    tokens_per_second: dict[int, Interval]
    memory_bytes: int | None
    others_share: float


class ParityReport(_Record):
    """All checks and measurements that compare the trained model with the served model.

    Attributes:
        differences: token-by-token differences, keyed by the name of the comparison.
        speed: speed of each served format.
        examples: number of held-out examples that were compared token by token.
        seconds: time taken to create the report, in seconds.
    """

    checks: tuple[ParityCheck, ...]
    differences: dict[str, Differences]
    speed: dict[Format, Speed] = {}
    examples: int
    seconds: float

    @property
    def failed(self) -> tuple[str, ...]:
        """A description of each failed check, with its name, actual value and expected value."""
        return tuple(str(check) for check in self.checks if not check.passed)
