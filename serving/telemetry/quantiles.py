"""Quantiles of the last five minutes, within one per cent, in little and bounded memory.

A DDSketch (Masson, Rim and Lee 2019) promises a relative error and merges exactly, so a ring of sketches, one for each
half minute, is a sliding window: samples leave with their slot. Histograms in Prometheus answer the same question
over any time and many servers, at the resolution of their buckets; these are for the eyes of one operator.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from ddsketch import DDSketch
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from svc.version import VersionId

RELATIVE_ACCURACY = 0.01
SLOTS = 10
SLOT_S = 30.0
_TOGETHER = 256
QUANTILES = (0.5, 0.95, 0.99)


class RollingQuantiles:
    """Samples of one quantity over the last `SLOTS * SLOT_S` seconds.

    Args:
        clock: monotonic time, seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._new: list[tuple[int, float]] = []  # samples with their slots: many together cost half as much
        self._slots: dict[int, DDSketch] = {}
        self._slot = 0

    def observe(self, value: float) -> None:
        """Adds a sample."""
        self._new.append((int(self._clock() // SLOT_S), value))
        if len(self._new) >= _TOGETHER:
            self._take_new()

    def quantiles(self, wanted: Sequence[float] = QUANTILES) -> list[float]:
        """The samples at ranks q(n-1), rounded down, each within one per cent; empty when there are no samples."""
        self._take_new()
        if not self._slots:
            return []
        merged = DDSketch(RELATIVE_ACCURACY)
        for sketch in self._slots.values():
            merged.merge(sketch)
        # None only for an empty sketch, and there is a sample in every slot.
        return [merged.get_quantile_value(quantile) or 0.0 for quantile in wanted]

    def _take_new(self) -> None:
        self._drop_old()
        new, self._new = self._new, []
        for slot, value in new:
            if slot > self._slot - SLOTS:
                if slot not in self._slots:
                    self._slots[slot] = DDSketch(RELATIVE_ACCURACY)
                self._slots[slot].add(value)

    def _drop_old(self) -> None:
        """Forgets the slots that left the window."""
        now = int(self._clock() // SLOT_S)
        if now != self._slot:
            self._slot = now
            self._slots = {slot: sketch for slot, sketch in self._slots.items() if slot > now - SLOTS}


class VersionQuantiles(Collector):
    """Rolling quantiles for each version, as a gauge. A version without samples in the window has no series.

    Args:
        name: of the gauge.
        documentation: its help text.
        clock: monotonic time, seconds.
    """

    def __init__(self, name: str, documentation: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._documentation = documentation
        self._clock = clock
        self._versions: dict[VersionId, RollingQuantiles] = {}
        self._lock = threading.Lock()  # requests end in one thread, pages are written in others

    def observe(self, version: VersionId, seconds: float) -> None:
        """Adds a sample of a version."""
        with self._lock:
            rolling = self._versions.get(version)
            if rolling is None:
                rolling = self._versions[version] = RollingQuantiles(self._clock)
            rolling.observe(seconds)

    def quantiles(self) -> dict[VersionId, list[float]]:
        """The values at `QUANTILES` of every version with samples; forgets the others."""
        with self._lock:
            values = {version: rolling.quantiles() for version, rolling in self._versions.items()}
            self._versions = {version: rolling for version, rolling in self._versions.items() if values[version]}
        return {version: found for version, found in values.items() if found}

    def describe(self) -> Iterable[Metric]:
        """The family without samples."""
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        """One sample for each version and quantile."""
        family = self._family()
        for version, values in self.quantiles().items():
            for quantile, value in zip(QUANTILES, values, strict=True):
                family.add_metric([version.name, str(version.number), f"{quantile:g}"], value)
        return [family]

    def _family(self) -> GaugeMetricFamily:
        return GaugeMetricFamily(self._name, self._documentation, labels=["model", "version", "quantile"])
