"""Exposes vLLM's own metrics on the server's metrics page, adding the labels `model`, `version` and `replica`.

An engine listens on a private socket that scrapers cannot reach. Its counters continue across an
in-place swap, so each version's series begins at the previous version's value, which `rate` and
`increase` handle.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from svc.engine.client import EngineClient
from svc.errors import EngineError
from svc.version import Target

log = logging.getLogger(__name__)

_NOT_SHOWN = "vllm:lora_requests_info"
"""vLLM metric that is omitted because its labels contain adapter names. Names change on each load, so the
number of series would be unbounded."""
_TIMEOUT_S = 2.0
"""Seconds to wait for an engine's metrics. The timeout is short because the server's own metrics must not be delayed by
a hung engine: they are needed to diagnose the problem."""


@dataclass(frozen=True, slots=True)
class EngineSource:
    """An engine whose metrics are read, and the version that it runs."""

    client: EngineClient
    served: Target
    replica: int


class EngineMetrics(Collector):
    """The metrics of all engines, as of the last call to `refresh`.

    Args:
        sources: function that returns the engines that are currently running.
    """

    def __init__(self, sources: Callable[[], Sequence[EngineSource]]) -> None:
        self._sources = sources
        self._families: list[Metric] = []

    async def refresh(self) -> None:
        """Read the engines' metrics, skipping engines that do not respond within `_TIMEOUT_S`."""
        sources = self._sources()
        pages = await asyncio.gather(*(_page(source) for source in sources))
        # In a thread, because it takes some milliseconds, and streams must not wait.
        self._families = await asyncio.to_thread(_merged, sources, pages)

    def collect(self) -> Iterable[Metric]:
        return self._families


async def _page(source: EngineSource) -> str:
    try:
        return await source.client.metrics(timeout_s=_TIMEOUT_S)
    except EngineError as error:
        log.debug("could not read the metrics of replica %d: %r", source.replica, error)
        return ""


def _merged(sources: Sequence[EngineSource], pages: Sequence[str]) -> list[Metric]:
    """Return one metric family per name, containing the samples of all engines."""
    merged: dict[str, Metric] = {}
    for source, page in zip(sources, pages, strict=True):
        version = source.served.version
        added = {"model": version.name, "version": str(version.number), "replica": str(source.replica)}
        try:
            families = [family for family in text_string_to_metric_families(page) if _is_shown(family.name)]
        except ValueError:
            log.warning("could not parse the metrics of replica %d", source.replica, exc_info=True)
            continue
        for family in families:
            samples = [sample._replace(labels=added | sample.labels) for sample in family.samples]
            family.samples = []
            merged.setdefault(family.name, family).samples += samples
    return list(merged.values())


def _is_shown(name: str) -> bool:
    # In this format a series' creation time is a separate gauge, with a name that OpenMetrics reserves.
    return name.startswith("vllm:") and not name.endswith("_created") and name != _NOT_SHOWN
