"""Quantiles of durations, with anytime-valid confidence limits."""

import math

_RESOLUTION = math.log(1.01)
"""Relative width of the histogram's logarithmic bins: 1%."""
_SHORTEST_S, _LONGEST_S = 1e-4, 1e5
_BINS = math.ceil(math.log(_LONGEST_S / _SHORTEST_S) / _RESOLUTION) + 1


class Times:
    """A fixed-size histogram of durations in seconds."""

    def __init__(self) -> None:
        self._counts = [0] * _BINS
        self._highest = 0
        self.count = 0

    def add(self, seconds: float) -> None:
        if not _SHORTEST_S <= seconds <= _LONGEST_S:
            seconds = min(max(seconds, _SHORTEST_S), _LONGEST_S)
        place = int(math.log(seconds / _SHORTEST_S) / _RESOLUTION)
        self._counts[place] += 1
        self.count += 1
        if place > self._highest:
            self._highest = place

    def quantile(self, share: float) -> float:
        """Return a quantile of the times, rounded up by at most 1%.

        Raises:
            ValueError: no times have been recorded.
        """
        if not self.count:
            raise ValueError("no times")
        return self._upper_edge(self._bin(math.ceil(share * self.count)))

    def limits(self, share: float, error: float) -> tuple[float, float | None]:
        """Return anytime-valid confidence limits of a quantile.

        The method is from Howard and Ramdas 2022, "Sequential estimation of quantiles with applications to A/B testing
        and best-arm identification", Bernoulli 28, equation 3 (an iterated-logarithm bound).

        Args:
            error: allowed probability that the quantile is ever outside the limits.

        Returns:
            The lower limit (0 if unknown) and the upper limit (None if unknown).
        """
        if not self.count:
            return 0.0, None
        rate = (1.4 * math.log(math.log(2.1 * max(self.count, 1))) + math.log(10 / error)) / self.count
        width = 1.5 * math.sqrt(share * (1 - share) * rate) + 0.8 * rate
        below, above = math.floor((share - width) * self.count), math.ceil((share + width) * self.count) + 1
        low = self._lower_edge(self._bin(below)) if below >= 1 else 0.0
        return low, self._upper_edge(self._bin(above)) if above <= self.count else None

    def _bin(self, rank: int) -> int:
        """Return the histogram bin that contains the time with the given rank.

        Rank 1 is the shortest time. The search starts from the longest times, which is faster for high quantiles.
        """
        place, above = self._highest, self.count - rank
        while (above := above - self._counts[place]) >= 0:
            place -= 1
        return place

    @staticmethod
    def _lower_edge(place: int) -> float:
        return _SHORTEST_S * math.exp(place * _RESOLUTION)

    @staticmethod
    def _upper_edge(place: int) -> float:
        return _SHORTEST_S * math.exp((place + 1) * _RESOLUTION)
