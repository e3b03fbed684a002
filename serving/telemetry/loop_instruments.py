"""Counter and histogram that can handle thousands of request and token events per second.

prometheus_client's instruments take a lock for each sample, check its labels and iterate over the buckets.
These instruments need no lock, because only the event loop's thread adds samples. A metrics page that
another thread is writing at the same time may miss the newest samples.
"""

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString


class LoopCounter(Collector):
    """A counter for each set of label values, incremented as in `counter.counts["tuned", "1"] += 1`.

    Args:
        name: the metric's name.
        documentation: the metric's help text.
        labels: label names, in the order of the label values.
        registry: registry that exports the metric.
    """

    def __init__(self, name: str, documentation: str, labels: Sequence[str], *, registry: CollectorRegistry) -> None:
        self._family = partial(CounterMetricFamily, name, documentation, labels=labels)
        self.counts = defaultdict[tuple[str, ...], int](int)
        registry.register(self)

    def remove(self, firsts: Container[tuple[str, ...]]) -> None:
        """Remove the counts whose first two label values are among the pairs in `firsts`."""
        for labels in [labels for labels in self.counts if labels[:2] in firsts]:
            del self.counts[labels]

    def collect(self) -> Iterable[Metric]:
        family = self._family()
        for labels, count in list(self.counts.items()):
            family.add_metric(labels, float(count))
        return [family]


class LoopSeries:
    """Histogram for one set of label values.

    Args:
        bounds: upper bounds of the buckets, in ascending order, excluding infinity.
    """

    __slots__ = ("_bounds", "counts", "exemplars", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.exemplars: dict[int, Exemplar] = {}  # by bucket
        self.sum = 0.0

    def observe(self, value: float, exemplar: dict[str, str] | None = None) -> None:
        """Add a sample to the histogram.

        Args:
            exemplar: labels that identify the sample's source. Each bucket shows its newest exemplar.
        """
        bucket = bisect_left(self._bounds, value)
        self.counts[bucket] += 1
        self.sum += value
        if exemplar is not None:
            self.exemplars[bucket] = Exemplar(exemplar, value, time.time())


class LoopHistogram(Collector):
    """A histogram with a separate series for each set of label values.

    Args:
        name: the metric's name.
        documentation: the metric's help text.
        labels: label names, in the order of the label values.
        buckets: upper bounds of the buckets, in ascending order, excluding infinity.
        registry: registry that exports the metric.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        buckets: Sequence[float],
        *,
        registry: CollectorRegistry,
    ) -> None:
        self._family = partial(HistogramMetricFamily, name, documentation, labels=labels)
        self._bounds = tuple(map(float, buckets))
        self._series: dict[tuple[str, ...], LoopSeries] = {}
        registry.register(self)

    def series(self, *labels: str) -> LoopSeries:
        """Return the series for the given label values."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = LoopSeries(self._bounds)
        return series

    def remove(self, firsts: Container[tuple[str, ...]]) -> None:
        """Remove the series whose first two label values are among the pairs in `firsts`."""
        for labels in [labels for labels in self._series if labels[:2] in firsts]:
            del self._series[labels]

    def collect(self) -> Iterable[Metric]:
        family = self._family()
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        for labels, series in list(self._series.items()):
            total, buckets = 0, list[tuple[str, float] | tuple[str, float, Exemplar]]()
            for bucket, (bound, count) in enumerate(zip(bounds, series.counts, strict=True)):
                total += count
                exemplar = series.exemplars.get(bucket)
                buckets.append((bound, float(total), exemplar) if exemplar else (bound, float(total)))
            family.add_metric(labels, buckets, series.sum)
        return [family]
