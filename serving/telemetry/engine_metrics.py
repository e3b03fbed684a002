"""vLLM's own metrics on our page, each with the labels `model`, `version` and `replica`.

An engine listens on a private socket, where no scraper reaches it. Its counters go on over a change of version in
place: each version's series then begins at what the one before had reached, which `rate` and `increase` do not mind.
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
"""Has the names of adapters in its labels, which are new at each load: series without end."""
_TIMEOUT_S = 2.0
"""Our own figures do not wait for an engine that hangs: that is when they are needed."""


@dataclass(frozen=True, slots=True)
class EngineSource:
    """An engine that has metrics.

    Attributes:
        client: asks the engine.
        served: the version that it holds.
        replica: its number.
    """

    client: EngineClient
    served: Target
    replica: int


class EngineMetrics(Collector):
    """The engines' families as they were at the last `refresh`.

    Args:
        sources: the engines that answer now.
    """

    def __init__(self, sources: Callable[[], Sequence[EngineSource]]) -> None:
        self._sources = sources
        self._families: list[Metric] = []

    async def refresh(self) -> None:
        """Asks the engines; there is nothing to show of one that does not answer."""
        sources = self._sources()
        pages = await asyncio.gather(*(_page(source) for source in sources))
        # Some milliseconds, which no stream shall wait for.
        self._families = await asyncio.to_thread(_merged, sources, pages)

    def collect(self) -> Iterable[Metric]:
        """The families."""
        return self._families


async def _page(source: EngineSource) -> str:
    try:
        return await source.client.metrics(timeout_s=_TIMEOUT_S)
    except EngineError as error:
        log.debug("replica %d shows no metrics: %r", source.replica, error)
        return ""


def _merged(sources: Sequence[EngineSource], pages: Sequence[str]) -> list[Metric]:
    """Return one family of each name, with the samples of all engines."""
    merged: dict[str, Metric] = {}
    for source, page in zip(sources, pages, strict=True):
        version = source.served.version
        added = {"model": version.name, "version": str(version.number), "replica": str(source.replica)}
        try:
            families = [family for family in text_string_to_metric_families(page) if _is_shown(family.name)]
        except ValueError:
            log.warning("the metrics of replica %d cannot be read", source.replica, exc_info=True)
            continue
        for family in families:
            samples = [sample._replace(labels=added | sample.labels) for sample in family.samples]
            family.samples = []
            merged.setdefault(family.name, family).samples += samples
    return list(merged.values())


def _is_shown(name: str) -> bool:
    # When a series began is a gauge of its own in this format, under a name that OpenMetrics reserves.
    return name.startswith("vllm:") and not name.endswith("_created") and name != _NOT_SHOWN
