"""How fast the engines of a model generate one answer, as measured by those that ended lately.

For an answer that its client left: the engine does not say how many tokens it computed. The estimate is off by as much
as that answer's pace differed from the mean of the others: by its prompt's length and by what ran beside it.
"""

import math

_KEPT_TOKENS = 2000.0
"""So many tokens of later answers leave an answer a third of its weight."""
_FIRST_PACE = 100.0
"""Tokens for each second, before anything was measured: a fast single stream."""


class TokenPace:
    """Tokens for each second of an answer, its prompt and its wait in the engine included.

    An answer weighs as much as it has tokens, so that nobody makes leaving early cheap by answers of one token each.
    """

    __slots__ = ("_seconds", "_tokens")

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0  # weighted sums

    def observe(self, tokens: float, seconds: float) -> None:
        """Take an answer that is complete.

        Args:
            tokens: of each of its choices, which are generated at the same time.
        """
        kept = math.exp(-tokens / _KEPT_TOKENS)
        self._tokens = kept * self._tokens + tokens * tokens
        self._seconds = kept * self._seconds + tokens * seconds

    def tokens_in(self, seconds: float) -> float:
        """Return about how many tokens of one choice were generated in so many seconds."""
        return seconds * (self._tokens / self._seconds if self._seconds else _FIRST_PACE)
