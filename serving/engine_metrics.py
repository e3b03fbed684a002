"""vLLM's own metrics on our page, each with the labels `model` and `version`.

The engine listens on a private socket, where no scraper reaches it. Its counters go on over a change of version in
place: each version's series then begins at what the one before had reached, which `rate` and `increase` do not mind.
"""

import asyncio
import logging
from collections.abc import Iterable

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from serving.routing import Routes

log = logging.getLogger(__name__)

_PREFIX = "vllm:"
_TIMEOUT_S = 2.0
"""Our own figures do not wait for an engine that hangs: that is when they are needed."""


class EngineMetrics(Collector):
    """The engine's families as they were at the last `refresh`.

    Args:
        engine: a client whose base URL is the engine.
        routes: tells which version the engine holds.
    """

    def __init__(self, engine: httpx.AsyncClient, routes: Routes) -> None:
        self._engine = engine
        self._routes = routes
        self._families: list[Metric] = []

    async def refresh(self) -> None:
        """Asks the engine; there is nothing to show where it does not answer."""
        try:
            answer = await self._engine.get("/metrics", timeout=_TIMEOUT_S)
            answer.raise_for_status()
            # Some milliseconds, which no stream shall wait for.
            self._families = await asyncio.to_thread(self._labelled, answer.text)
        except httpx.HTTPError as error:
            log.debug("the engine shows no metrics: %r", error)
            self._families = []
        except ValueError:
            log.warning("the engine's metrics cannot be read", exc_info=True)
            self._families = []

    def _labelled(self, exposition: str) -> list[Metric]:
        served = self._routes.served
        if served is None:
            return []
        added = {"model": served.version.name, "version": str(served.version.number)}
        families = [
            family
            for family in text_string_to_metric_families(exposition)
            # When a series began is a gauge of its own in this format, under a name that OpenMetrics reserves.
            if family.name.startswith(_PREFIX) and not family.name.endswith("_created")
        ]
        for family in families:
            family.samples = [sample._replace(labels=added | sample.labels) for sample in family.samples]
        return families

    def describe(self) -> Iterable[Metric]:
        """Nothing: which families there are is the engine's to say."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The families."""
        return self._families
