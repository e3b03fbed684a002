"""Passes the server's own metrics through with unchanged names, and adds metrics on whether the server responded.

A server that responds with something other than metrics may still serve clients. It therefore counts as up, but
its page counts as unreadable.
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
"""Timeout in seconds, well below Prometheus' default of 10, so that a scrape can still report a server as down."""
_OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0; escaping=allow-utf-8"}


class ServerPage(Collector):
    """Collector that fetches the server's metrics page on each scrape.

    Args:
        find: returns the server's current address; raises ServerNotRunningError if none is running.
    """

    def __init__(self, find: Callable[[], ServerAddress]) -> None:
        self._find = find

    def collect(self) -> Iterable[Metric]:
        """Yield three metrics about this scrape, followed by the server's metrics if they can be read."""
        started = time.monotonic()
        answer = self._ask()
        seconds = time.monotonic() - started
        families = _families(answer) if answer is not None else None
        yield GaugeMetricFamily("svc_server_up", "1 if the server responded", value=float(answer is not None))
        readable = float(families is not None)
        yield GaugeMetricFamily("svc_server_page_readable", "1 if the server's metrics could be read", value=readable)
        yield GaugeMetricFamily(
            "svc_server_scrape_duration_seconds", "Time in seconds that the server took to respond", value=seconds
        )
        yield from families or ()

    def _ask(self) -> httpx.Response | None:
        """Fetch the server's metrics page and return the response.

        The result is None if the server does not respond in time, or if the status is 5xx, such as a proxy's 502.
        """
        try:
            with self._find().client(_TIMEOUT_S) as client:
                # OpenMetrics is the only text format with exemplars.
                answer = client.get("/metrics", headers=_OPENMETRICS)
            if answer.is_server_error:
                answer.raise_for_status()
            return answer
        except (ServerNotRunningError, httpx.HTTPError, httpx.InvalidURL) as error:
            log.warning("the server is not responding: %s", error)
            return None


def _families(answer: httpx.Response) -> list[Metric] | None:
    """Parse the metrics in a response, or return None if they cannot be read."""
    try:
        answer.raise_for_status()
        families: list[Metric] = list(text_string_to_metric_families(answer.text))  # type: ignore[no-untyped-call]
        return families
    except (httpx.HTTPStatusError, ValueError) as error:
        log.warning("cannot read the server's metrics: %s", error)
        return None
