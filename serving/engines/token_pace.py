"""Estimates a model's generation speed for a single answer from recently completed answers.

The estimate is used for answers whose client disconnected, because the engine does not report how many tokens it
generated for them. The more such an answer's speed differs from the mean, the less accurate the estimate is.
"""

import math

_DECAY_TOKENS = 2000.0
"""An answer's weight in the mean speed drops to about a third once later answers contain this many tokens in total."""
_FIRST_PACE = 100.0
"""Tokens per second assumed before the first measurement. This is the speed of a fast single stream."""


class TokenPace:
    """Mean speed at which recent answers were generated, in tokens per second.

    An answer's time includes prompt processing and waiting in the engine. In the mean, answers are weighted by their
    number of tokens, so that clients cannot lower the estimate with one-token answers.
    """

    __slots__ = ("_seconds", "_tokens")

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0  # weighted sums

    def observe(self, tokens: float, seconds: float) -> None:
        """Update the mean speed with the speed of a completed answer.

        Args:
            tokens: number of tokens in each of the answer's choices, which are generated concurrently.
        """
        decay = math.exp(-tokens / _DECAY_TOKENS)
        self._tokens = decay * self._tokens + tokens * tokens
        self._seconds = decay * self._seconds + tokens * seconds

    def tokens_in(self, seconds: float) -> float:
        """Return the estimated number of tokens generated for one choice in `seconds`."""
        return seconds * (self._tokens / self._seconds if self._seconds else _FIRST_PACE)
