"""The metrics page of `svc monitor`, which covers the server, versions, training runs, drift, keys and backups.

The monitor is a separate process, so that it outlives the server. A monitor on another machine exports
only the server's own metrics.
"""

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server
from sqlalchemy import Engine as Store

from monitoring.exporter.deadlines import DeadlineMetrics
from monitoring.exporter.drift import DriftMetrics
from monitoring.exporter.server_page import ServerPage
from monitoring.exporter.training import TrainingMetrics
from monitoring.exporter.versions import VersionMetrics
from svc.registry.registry import Registry
from svc.remote.listening import http_url, listen_error
from svc.remote.server_url import ServerAddress

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_OPENMETRICS = "application/openmetrics-text"


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
    certificate: Path | None = None,
) -> Iterator[str]:
    """Serve /metrics while the `with` body runs, and yield the page's URL.

    Args:
        home: folder that contains the training runs.
        find_server: returns the server's current address, or raises ServerNotRunningError if no server is
            running.
        port: port to listen on; 0 selects any free port.
        checking: whether drift checks run.
        certificate: the server's certificate file in PEM format, or None if the server has no certificate.

    Raises:
        BusyError: the port is in use.
        SettingsError: listening on `host` and `port` failed for any other reason.
    """
    metrics = CollectorRegistry()
    for collector in (
        ServerPage(find_server),
        VersionMetrics(registry),
        TrainingMetrics(registry, home),
        DriftMetrics(registry, store, checking=checking),
        DeadlineMetrics(store, certificate),
    ):
        metrics.register(collector)
    try:
        # A host name is resolved to its IPv4 address, as for the server.
        address = host if ":" in host else socket.gethostbyname(host)
        server, thread = start_http_server(port, address, metrics)
    except (OSError, UnicodeError) as error:  # the latter: not a valid host name
        raise listen_error(host, port, error) from error
    with server:
        server.set_app(_page(metrics))
        try:
            yield f"{http_url(host, server.server_port)}/metrics"
        finally:
            server.shutdown()
            thread.join()


def _page(metrics: CollectorRegistry) -> "WSGIApplication":
    """Return prometheus_client's metrics page, keeping vLLM's metric names unchanged in OpenMetrics too.

    prometheus_client's OpenMetrics encoder writes `vllm:` as `vllm_` unless the request accepts UTF-8 names. The option
    `escaping=allow-utf-8` is therefore added to every request's `Accept` header.
    """
    page = make_wsgi_app(metrics)

    def application(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        accept = environ.get("HTTP_ACCEPT", "").replace(_OPENMETRICS, f"{_OPENMETRICS};escaping=allow-utf-8")
        answer: Iterable[bytes] = page(environ | {"HTTP_ACCEPT": accept}, start_response)
        return answer

    return application
