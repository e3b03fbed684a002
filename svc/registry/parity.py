"""A version's parity report: checks that the trained model equals the served one.

Created once, before registration, from the registered files and on the engine that serves them. Knows nothing of its
measurement (trainer/parity) and of its display.
"""

import math
from statistics import fmean

from pydantic import BaseModel, ConfigDict, Field

from svc.evaluation.intervals import Interval
from svc.version import Format


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParityCheck(_Record):
    """One comparison.

    Attributes:
        name: of the compared property.
        found: its value.
        expected: the required value, with the limit.
    """

    name: str
    passed: bool
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.name}: {self.found}, expected {self.expected}"


class Differences(_Record):
    """Differences of two models on the same tokens, each given all before it.

    Attributes:
        nats: log-probability of each token in the second minus that in the first, by example.
        agreement: share of tokens with the same top-1 token in both.
        diverges_at: example and token of the first different top-1 token; None if all are the same.
    """

    nats: tuple[tuple[float, ...], ...]
    agreement: float = Field(ge=0, le=1)
    diverges_at: tuple[int, int] | None

    @property
    def all(self) -> list[float]:
        """Differences of all tokens, nats."""
        return [difference for example in self.nats for difference in example]

    @property
    def mean(self) -> float:
        """Mean of the absolute differences, nats per token."""
        return fmean(map(abs, self.all))

    @property
    def largest(self) -> float:
        """The largest absolute difference, nats."""
        return max(map(abs, self.all))

    @property
    def shift(self) -> float:
        """Increase of the negative log-likelihood from the first to the second, nats per token."""
        return -math.fsum(self.all) / len(self.all)


class Speed(_Record):
    """Speed of a format on the engine, each figure measured several times.

    Attributes:
        load_seconds: reload in place; None for a model that only a new engine can load.
        first_token_seconds: from an uncached prompt to the first token, without other requests.
        tokens_per_second: decoded, by the number of streams.
        memory_bytes: of the engine's processes; None if unknown.
        others_share: of the machine's processors, used by other processes during the measurement.
    """

    load_seconds: Interval | None
    first_token_seconds: Interval
    tokens_per_second: dict[int, Interval]
    memory_bytes: int | None
    others_share: float


class ParityReport(_Record):
    """The report.

    Attributes:
        differences: token by token, by name of the comparison.
        speed: of the served formats.
        examples: held-out examples that were compared token by token.
        seconds: time to create it.
    """

    checks: tuple[ParityCheck, ...]
    differences: dict[str, Differences]
    speed: dict[Format, Speed] = {}
    examples: int
    seconds: float

    @property
    def failed(self) -> tuple[str, ...]:
        """Failed checks, as text for people."""
        return tuple(str(check) for check in self.checks if not check.passed)
