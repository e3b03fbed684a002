"""How fast an engine generates one answer, as measured by those that ended lately.

For an answer that its client left: the engine does not say how many tokens it computed. The estimate is off by as much
as that answer's pace differed from the mean of the others: by its prompt's length and by what ran beside it.
"""

import math

_KEPT = 0.95
"""What an answer leaves of the weight of those before: the last twenty count for two thirds."""


class TokenPace:
    """The pace of one engine: tokens for each second of an answer, its prompt and its wait in the engine included."""

    __slots__ = ("_seconds", "_tokens")

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """Take an answer that is complete.

        Args:
            tokens: of all its choices together.
            seconds: that it took, times its choices: these are generated at the same time.
        """
        self._tokens = _KEPT * self._tokens + tokens
        self._seconds = _KEPT * self._seconds + seconds

    def estimate(self, seconds: float, most: int) -> int:
        """Return about how many tokens were generated in so many seconds; `most` where nothing was measured yet.

        Args:
            seconds: as for `observe`.
            most: that the answer may have.
        """
        if not self._seconds:
            return most
        return min(most, math.ceil(seconds * self._tokens / self._seconds))
