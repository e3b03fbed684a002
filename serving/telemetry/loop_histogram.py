"""A histogram for what comes with every request and every token, of which there are thousands a second.

prometheus_client's takes a lock and walks through its buckets for each sample. Samples of these come from one thread
alone, the event loop's, so they need no lock; a page that is written meanwhile in another thread may miss the newest.
"""

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString


class LoopSeries:
    """The samples of one set of labels.

    Args:
        bounds: upper ones of the buckets, in ascending order, without infinity.
    """

    __slots__ = ("_bounds", "counts", "exemplars", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.exemplars: dict[int, Exemplar] = {}  # by bucket
        self.sum = 0.0

    def observe(self, value: float, exemplar: Mapping[str, str] | None = None) -> None:
        """Adds a sample.

        Args:
            exemplar: labels that lead to it; the newest of a bucket is shown.
        """
        bucket = bisect_left(self._bounds, value)
        self.counts[bucket] += 1
        self.sum += value
        if exemplar is not None:
            self.exemplars[bucket] = Exemplar(dict(exemplar), value, time.time())


class LoopHistogram(Collector):
    """Series by their labels.

    Args:
        name: of the metric.
        documentation: its help text.
        labels: their names.
        buckets: their upper bounds, in ascending order, without infinity.
    """

    def __init__(self, name: str, documentation: str, labels: Sequence[str], *, buckets: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._bounds = tuple(map(float, buckets))
        self._series: dict[tuple[str, ...], LoopSeries] = {}

    def series(self, *labels: str) -> LoopSeries:
        """That of some labels, in the order of their names."""
        found = self._series.get(labels)
        if found is None:
            found = self._series[labels] = LoopSeries(self._bounds)
        return found

    def describe(self) -> Iterable[Metric]:
        """The family without samples."""
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        """All series."""
        family = self._family()
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for labels, series in list(self._series.items()):
            total, buckets = 0, list[tuple[str, float] | tuple[str, float, Exemplar]]()
            for bucket, (name, count) in enumerate(zip(names, series.counts, strict=True)):
                total += count
                exemplar = series.exemplars.get(bucket)
                buckets.append((name, float(total), exemplar) if exemplar else (name, float(total)))
            family.add_metric(labels, buckets, series.sum)
        return [family]

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
