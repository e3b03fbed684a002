"""Decides, based on the number of requests over time, how many replicas a model needs. This module does not start or
stop replicas itself.

Replicas are added when the mean load over half a minute exceeds the target load of the current replicas. They are
removed when fewer replicas would have been enough, with a margin, for the busiest half minute of a longer period (by
default, a quarter of an hour). A short burst therefore adds no replica, and a replica that was needed recently is not
removed.
"""

from collections import deque
from dataclasses import dataclass, field
from math import ceil

MEAN_S = 30.0
"""Length of the window over which the load is averaged, in seconds."""
_TARGET_SHARE = 0.7
"""A replica is added if more than this fraction of the current replicas' sequence slots is in use. A new replica takes
a minute or two to start."""
_REMOVAL_SHARE = 0.5
"""A replica is removed if, without it, the load would use less than this fraction of the remaining sequence slots."""


@dataclass(eq=False)
class ScalingPolicy:
    """Decides the number of replicas of one model.

    Attributes:
        least, most: limits on the number of replicas.
        sequences: number of requests that one replica answers concurrently.
        hold_s: a replica is removed once fewer replicas would have been enough for this long, in seconds.
    """

    least: int
    most: int
    sequences: int
    hold_s: float
    _samples: deque[tuple[float, float]] = field(default_factory=deque, init=False)
    _means: deque[tuple[float, float]] = field(default_factory=deque, init=False)
    _since: float | None = field(default=None, init=False)

    def wanted(self, now: float, requests: int, replicas: int) -> int:
        """Return the desired number of replicas. Call this every few seconds.

        Args:
            now: time of the observation, in seconds on any monotonic clock.
            requests: number of running and queued requests.
            replicas: current number of replicas, including those that are starting.
        """
        self._since = now if self._since is None else self._since
        self._samples.append((now, requests))
        while self._samples[0][0] <= now - MEAN_S:
            self._samples.popleft()
        mean = sum(count for _, count in self._samples) / len(self._samples)
        while self._means and self._means[-1][1] <= mean:  # only maxima of the rest of the window are kept
            self._means.pop()
        self._means.append((now, mean))
        while self._means[0][0] <= now - self.hold_s:
            self._means.popleft()
        if now - self._since < MEAN_S:
            return self._limited(replicas)
        needed = ceil(mean / (self.sequences * _TARGET_SHARE))
        if needed > replicas:
            return self._limited(needed)
        enough = ceil(self._means[0][1] / (self.sequences * _REMOVAL_SHARE))
        if now - self._since >= self.hold_s and enough < replicas:
            return self._limited(replicas - 1)
        return self._limited(replicas)

    def reset(self) -> None:
        """Forget all observations, for example because the model was idle or its engines were changed."""
        self._samples.clear()
        self._means.clear()
        self._since = None

    def _limited(self, replicas: int) -> int:
        return max(self.least, min(self.most, replicas))
