"""Computes quantiles over the last five minutes to within 1%, using a small, bounded amount of memory.

Samples are counted in buckets whose upper bounds grow by 2%, as in a DDSketch (Masson, Rim and Lee 2019). The middle
of a bucket is within 1% of all its samples. Counts are kept for each half minute, can be merged exactly, and expire as
a whole. These quantiles give an operator a quick overview, whereas Prometheus histograms give quantiles for any time
range and across servers, at the resolution of their buckets.
"""

import math
import threading
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

SLOTS = 10
SLOT_S = 30.0
QUANTILES = (0.5, 0.95, 0.99)
_RELATIVE_ACCURACY = 0.01
_GROWTH = (1 + _RELATIVE_ACCURACY) / (1 - _RELATIVE_ACCURACY)
_LOG_GROWTH = math.log(_GROWTH)
_MIN_S = 1e-6
"""Shortest time that can be recorded, in seconds. Shorter times are counted as this time."""

_Version = tuple[str, str]


class VersionQuantiles(Collector):
    """A gauge that exports each version's quantiles. Versions without recent samples have no series.

    Args:
        name: the gauge's name.
        documentation: the gauge's help text.
        clock: function that returns monotonic time, in seconds.
        registry: registry that exports the gauge.
    """

    def __init__(
        self, name: str, documentation: str, clock: Callable[[], float], *, registry: CollectorRegistry
    ) -> None:
        self._family = partial(GaugeMetricFamily, name, documentation, labels=["model", "version", "quantile"])
        self._clock = clock
        self._lock = threading.Lock()  # requests end in one thread, pages are written in others
        # The number of each slot, and the number of samples in each bucket of a version.
        self._slots = deque[tuple[int, dict[_Version, Counter[int]]]](maxlen=SLOTS)
        registry.register(self)

    def observe(self, version: _Version, seconds: float) -> None:
        """Add a sample for a version.

        Args:
            version: the values of the labels `model` and `version`.
        """
        bucket = math.ceil(math.log(max(seconds, _MIN_S)) / _LOG_GROWTH)
        slot = int(self._clock() // SLOT_S)
        with self._lock:
            if not self._slots or self._slots[-1][0] != slot:
                self._slots.append((slot, defaultdict(Counter)))
            self._slots[-1][1][version][bucket] += 1

    def collect(self) -> Iterable[Metric]:
        """Return a gauge with the quantiles of each version's recent samples."""
        oldest = int(self._clock() // SLOT_S) - SLOTS + 1
        merged: defaultdict[_Version, Counter[int]] = defaultdict(Counter)
        with self._lock:
            for slot, versions in self._slots:
                for version, counts in versions.items() if slot >= oldest else ():
                    merged[version].update(counts)
        family = self._family()
        for version, counts in merged.items():
            for quantile, value in zip(QUANTILES, _quantiles(counts), strict=True):
                family.add_metric([*version, f"{quantile:g}"], value)
        return [family]


def _quantiles(counts: Counter[int]) -> list[float]:
    """Return, for each quantile q, the middle of the bucket that contains the sample of rank floor(q(n-1))."""
    buckets = sorted(counts)
    reached = list(accumulate(counts[bucket] for bucket in buckets))
    ranks = [int(quantile * (reached[-1] - 1)) for quantile in QUANTILES]
    return [2 * _GROWTH ** buckets[bisect_right(reached, rank)] / (_GROWTH + 1) for rank in ranks]
