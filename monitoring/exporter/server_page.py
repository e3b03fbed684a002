"""A server's own metrics page, passed on: the same families under the same names, and whether it answered.

A server that answers something else than metrics serves its clients all the same: it is up, and its page unreadable.
"""

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
        """Return its families, and three of our own."""
        started = time.monotonic()
        answer = self._ask()
        seconds = time.monotonic() - started
        families = _families(answer) if answer is not None else None
        yield GaugeMetricFamily("svc_server_up", "1 when the server answered", value=float(answer is not None))
        readable = float(families is not None)
        yield GaugeMetricFamily("svc_server_page_readable", "1 when its metrics could be read", value=readable)
        yield GaugeMetricFamily("svc_server_scrape_duration_seconds", "How long it took to answer", value=seconds)
        yield from families or ()

    def _ask(self) -> httpx.Response | None:
        """Return the answer, None if there is none: a proxy's 502 is none of the server's."""
        try:
            with self._find().client(_TIMEOUT_S) as client:
                # OpenMetrics, because exemplars are in no other text format.
                answer = client.get("/metrics", headers=_OPENMETRICS)
            if answer.is_server_error:
                answer.raise_for_status()
            return answer
        except (ServerNotRunningError, httpx.HTTPError, httpx.InvalidURL) as error:
            log.warning("the server does not answer: %s", error)
            return None


def _families(answer: httpx.Response) -> list[Metric] | None:
    """Return the metrics of a page, None if it has none that can be read."""
    try:
        answer.raise_for_status()
        families: list[Metric] = list(text_string_to_metric_families(answer.text))  # type: ignore[no-untyped-call]
        return families
    except (httpx.HTTPStatusError, ValueError) as error:
        log.warning("the metrics of the server cannot be read: %s", error)
        return None
