"""`svc monitor`: one page with the server's metrics, and with what is known of versions, training runs and drift.

A process of its own, so that it goes on when the server does not. On another machine it has the server's page alone.
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
    """Answers /metrics for the body of the `with`; yields the page's URL.

    Args:
        home: where training runs are looked for.
        find_server: where the server is now; raises ServerNotRunningError.
        port: 0 for any free one.
        checking: somebody checks for drift.
        certificate: the server's, in PEM; None if it has none.

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
        DeadlineMetrics(store, certificate),
    ):
        metrics.register(collector)
    try:
        # A name stands for its IPv4 address, as for the server.
        address = host if ":" in host else socket.gethostbyname(host)
        server, thread = start_http_server(port, address, metrics)
    except (OSError, UnicodeError) as error:  # the latter: no host has such a name
        raise listen_error(host, port, error) from error
    with server:
        server.set_app(_page(metrics))
        try:
            yield f"{http_url(host, server.server_port)}/metrics"
        finally:
            server.shutdown()
            thread.join()


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
