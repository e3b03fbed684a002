"""A counter for what comes with every request.

prometheus_client's takes a lock for each count and looks at its labels. These are counted by one thread alone, the
event loop's, so they need no lock; a page that is written meanwhile in another thread may miss the newest.
"""

from collections.abc import Iterable, Sequence

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector


class LoopCount:
    """The count of one set of labels."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def add(self, amount: int = 1) -> None:
        """Counts so many more."""
        self.value += amount


class LoopCounter(Collector):
    """Counts by their labels.

    Args:
        name: of the metric.
        documentation: its help text.
        labels: their names.
    """

    def __init__(self, name: str, documentation: str, labels: Sequence[str]) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._counts: dict[tuple[str, ...], LoopCount] = {}

    def count(self, *labels: str) -> LoopCount:
        """That of some labels, in the order of their names."""
        found = self._counts.get(labels)
        if found is None:
            found = self._counts[labels] = LoopCount()
        return found

    def describe(self) -> Iterable[Metric]:
        """The family without samples."""
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        """All counts."""
        family = self._family()
        for labels, count in list(self._counts.items()):
            family.add_metric(labels, float(count.value))
        return [family]

    def _family(self) -> CounterMetricFamily:
        return CounterMetricFamily(self._name, self._documentation, labels=self._labels)
