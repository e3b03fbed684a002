"""What a version's parity report says: that what was trained is what is served, check by check.

Made once, before registration, of the files that are registered and on the engine that serves them. Knows nothing of
how it is measured (trainer/parity) and of how it is shown.
"""

import math
from statistics import fmean

from pydantic import BaseModel, ConfigDict, Field

from svc.evaluation.intervals import Interval
from svc.version import Format


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParityCheck(_Record):
    """One thing that must be equal.

    Attributes:
        name: of what is compared.
        found: what it is.
        expected: what it must be, with the limit.
    """

    name: str
    passed: bool
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.name}: {self.found}, expected {self.expected}"


class Differences(_Record):
    """How two models differ on the same tokens, each given all before it.

    Attributes:
        nats: log-probability of each token in the second less that in the first, by example.
        agreement: share of tokens before which both find the same token likeliest.
        diverges_at: example and token where they first do not; None where they always do.
    """

    nats: tuple[tuple[float, ...], ...]
    agreement: float = Field(ge=0, le=1)
    diverges_at: tuple[int, int] | None

    @property
    def all(self) -> list[float]:
        """Of all tokens."""
        return [one for example in self.nats for one in example]

    @property
    def mean(self) -> float:
        """Mean of the absolute differences, nats a token."""
        return fmean(abs(one) for one in self.all)

    @property
    def largest(self) -> float:
        """The largest absolute difference, nats."""
        return max(abs(one) for one in self.all)

    @property
    def shift(self) -> float:
        """By how much the negative log-likelihood is higher in the second, nats a token."""
        return -math.fsum(self.all) / len(self.all)


class Speed(_Record):
    """How a format runs on the engine, each measured several times.

    Attributes:
        load_seconds: reload in place; None of a model that only a new engine loads.
        first_token_seconds: from a prompt that is in no cache to the first token, alone.
        tokens_per_second: decoded, by the number of streams.
        memory_bytes: of the engine's processes; None where that cannot be told.
        others_share: of the machine's processors, used by other processes while this was measured.
    """

    load_seconds: Interval | None
    first_token_seconds: Interval
    tokens_per_second: dict[int, Interval]
    memory_bytes: int | None
    others_share: float


class ParityReport(_Record):
    """The report.

    Attributes:
        checks: all of them.
        differences: what was compared, token by token, by its name.
        speed: of the formats that are served.
        examples: held-out examples that were compared token by token.
        seconds: that making it took.
    """

    checks: tuple[ParityCheck, ...]
    differences: dict[str, Differences]
    speed: dict[Format, Speed] = {}
    examples: int
    seconds: float

    @property
    def failed(self) -> tuple[str, ...]:
        """What failed, as a person reads it."""
        return tuple(str(check) for check in self.checks if not check.passed)
