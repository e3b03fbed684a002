"""Figures a second, from two looks at counters. For eyes on a terminal; Prometheus has `rate`."""

from dataclasses import dataclass

from monitoring.status.figures import Figures


@dataclass(frozen=True, slots=True)
class Rate:
    """What a version does a second."""

    requests: float
    tokens_out: float


class Rates:
    """Remembers the last look."""

    def __init__(self) -> None:
        self._last: Figures | None = None
        self._at = 0.0

    def between(self, figures: Figures, now: float) -> dict[str, Rate]:
        """Each version's rates since the last look; empty at the first, and after a server's restart.

        Args:
            now: monotonic time of this look, seconds.
        """
        last, seconds = self._last, now - self._at
        self._last, self._at = figures, now
        if last is None or seconds <= 0:
            return {}
        rates = {}
        for name, new in figures.versions.items():
            old = last.versions.get(name)
            requests = new.requests - (old.requests if old else 0)
            tokens = new.tokens_out - (old.tokens_out if old else 0)
            if min(requests, tokens) >= 0:
                rates[name] = Rate(requests / seconds, tokens / seconds)
        return rates
