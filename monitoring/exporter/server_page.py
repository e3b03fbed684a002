"""A server's own metrics page, passed on: the same families under the same names, and whether it answered."""

import logging
import time
from collections.abc import Callable, Iterable

import httpx
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from svc.errors import ServerNotRunningError
from svc.remote.server_url import ServerAddress

log = logging.getLogger(__name__)

_TIMEOUT_S = 4.0
"""Well below the ten seconds after which Prometheus gives up, so that it hears that the server is down."""
_OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0; escaping=allow-utf-8"}


class ServerPage(Collector):
    """Asks the server whenever it is asked itself.

    Args:
        find: where the server is now. Raises ServerNotRunningError where none runs.
    """

    def __init__(self, find: Callable[[], ServerAddress]) -> None:
        self._find = find

    def collect(self) -> Iterable[Metric]:
        """Its families, and two of our own."""
        started = time.monotonic()
        families = self._fetch()
        seconds = time.monotonic() - started
        yield GaugeMetricFamily("svc_server_up", "1 when the server answered", value=float(families is not None))
        yield GaugeMetricFamily("svc_server_scrape_duration_seconds", "How long it took to answer", value=seconds)
        yield from families or ()

    def _fetch(self) -> list[Metric] | None:
        try:
            with self._find().client(_TIMEOUT_S) as client:
                # OpenMetrics, because exemplars are in no other text format.
                answer = client.get("/metrics", headers=_OPENMETRICS)
            answer.raise_for_status()
            families: list[Metric] = list(text_string_to_metric_families(answer.text))  # type: ignore[no-untyped-call]
            return families
        except (ServerNotRunningError, httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            log.warning("the server does not answer: %s", error)
            return None
