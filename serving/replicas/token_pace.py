"""Generation speed of a model's engines for a single answer, measured on recently completed answers.

It is used for answers whose client disconnected, because the engine does not report how many tokens it
generated for them. The error of the estimate is the difference between such an answer's speed and the
mean speed.
"""

import math

_DECAY_TOKENS = 2000.0
"""Number of tokens of later answers after which an answer's weight has fallen to about a third."""
_FIRST_PACE = 100.0
"""Tokens per second assumed before the first measurement, which is the speed of a fast single stream."""


class TokenPace:
    """Mean generation speed of an answer, in tokens per second.

    An answer's time includes the prompt and the wait in the engine. Answers are weighted by their tokens, so
    that clients cannot lower the estimate with answers of one token each.
    """

    __slots__ = ("_seconds", "_tokens")

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0  # weighted sums

    def observe(self, tokens: float, seconds: float) -> None:
        """Include a completed answer in the mean.

        Args:
            tokens: number of tokens in each of the answer's choices, which are generated concurrently.
        """
        decay = math.exp(-tokens / _DECAY_TOKENS)
        self._tokens = decay * self._tokens + tokens * tokens
        self._seconds = decay * self._seconds + tokens * seconds

    def tokens_in(self, seconds: float) -> float:
        """Return the estimated number of tokens generated for one choice in `seconds`."""
        return seconds * (self._tokens / self._seconds if self._seconds else _FIRST_PACE)
