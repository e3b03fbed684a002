"""`svc monitor`: one page with the server's metrics, and with what is known of versions, training runs and drift.

A process of its own, so that it goes on when the server does not. On another machine it has the server's page alone.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from sqlalchemy import Engine as Store

from monitoring.exporter.drift import DriftMetrics
from monitoring.exporter.server_page import ServerPage
from monitoring.exporter.training import TrainingMetrics
from monitoring.exporter.versions import VersionMetrics
from svc.registry.registry import Registry
from svc.remote.listening import address_family, http_url, listen_error
from svc.remote.server_url import ServerAddress

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_OPENMETRICS = "application/openmetrics-text"
_POLL_S = 0.05  # how soon it notices that it shall end


@contextmanager
def exporting(
    registry: Registry,
    store: Store,
    home: Path,
    find_server: Callable[[], ServerAddress],
    host: str,
    port: int,
    *,
    checking: bool = False,
) -> Iterator[str]:
    """Answers /metrics for the body of the `with`; yields the page's URL.

    Args:
        home: where training runs are looked for.
        find_server: where the server is now; raises ServerNotRunningError.
        port: 0 for any free one.
        checking: somebody checks for drift.

    Raises:
        BusyError: the port is in use.
        SettingsError: the address is none of this machine's.
    """
    metrics = CollectorRegistry()
    for collector in (
        ServerPage(find_server),
        VersionMetrics(registry),
        TrainingMetrics(registry, home),
        DriftMetrics(registry, store, checking=checking),
    ):
        metrics.register(collector)
    with _listen(host, port, _page(metrics)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="exporter")
        thread.start()
        try:
            yield f"{http_url(host, server.server_port)}/metrics"
        finally:
            server.shutdown()
            thread.join()


def _listen(host: str, port: int, page: "WSGIApplication") -> WSGIServer:
    family = address_family(host)

    class Server(ThreadingWSGIServer):
        """IPv4 or IPv6, which a server can only be told by its class."""

        address_family = family

    try:
        return make_server(host, port, page, Server, _Handler)
    except OSError as error:
        raise listen_error(host, port, error) from error


class _Handler(WSGIRequestHandler):
    """Logs no request."""

    def log_message(self, format: str, *arguments: object) -> None:
        """Stays silent."""


def _page(metrics: CollectorRegistry) -> "WSGIApplication":
    """prometheus_client's page, with the names of vLLM's metrics as they are.

    Its encoder for OpenMetrics writes `vllm:` as `vllm_` to who does not say that it knows better.
    """
    page = make_wsgi_app(metrics)

    def application(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        accept = environ.get("HTTP_ACCEPT", "").replace(_OPENMETRICS, f"{_OPENMETRICS};escaping=allow-utf-8")
        answer: Iterable[bytes] = page(environ | {"HTTP_ACCEPT": accept}, start_response)
        return answer

    return application
