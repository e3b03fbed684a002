"""Tests `svc monitor`: the server's page passed through, registry metrics, and a server that is down."""

import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine as Store

from monitoring.exporter.app import exporting
from monitoring.exporter.server_page import ServerPage
from svc.errors import BusyError, ServerNotRunningError, SettingsError
from svc.files.lock import hold_lock
from svc.identity.key_secret import new_secret
from svc.registry.registry import Registry
from svc.remote.server_url import LOCK_FILE, ServerAddress
from tests.builders.status_pages import serving
from tests.monitoring.exporter.tracked_runs import RUN, TrackedRuns
from tests.new_store import new_store
from tests.serving.versions import make_version

pytestmark = pytest.mark.slow

SERVER_PAGE = """# HELP svc_requests Requests answered
# TYPE svc_requests counter
svc_requests_total{model="tiny",route="/v1/chat/completions",status="200",version="2"} 41.0
# HELP svc_time_to_first_token_seconds First token
# TYPE svc_time_to_first_token_seconds histogram
svc_time_to_first_token_seconds_bucket{le="2.0",model="tiny",version="2"} 7.0 # {request_id="req-7"} 0.5 1790000000.0
svc_time_to_first_token_seconds_bucket{le="+Inf",model="tiny",version="2"} 8.0
svc_time_to_first_token_seconds_count{model="tiny",version="2"} 8.0
svc_time_to_first_token_seconds_sum{model="tiny",version="2"} 4.5
# HELP vllm:num_requests_running Running
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model="tiny",version="2"} 3.0
# EOF
"""
OPENMETRICS = {"accept": "application/openmetrics-text;version=1.0.0"}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models", TrackedRuns(tiny=[RUN]))


@contextmanager
def page_of(registry: Registry, page: tuple[int, str] | None) -> Iterator[str]:
    """Yield the URL of an exporter for a server with the given metrics page, or without a server."""
    if page is None:
        with exporting(registry, _store(registry), _home(registry), _nowhere, "127.0.0.1", 0) as exported:
            yield exported
        return
    with (
        serving({"/metrics": page}) as url,
        exporting(registry, _store(registry), _home(registry), lambda: ServerAddress(url), "127.0.0.1", 0) as exported,
    ):
        yield exported


def _store(registry: Registry) -> Store:
    return new_store(_home(registry))


def _home(registry: Registry) -> Path:
    return registry.models.parent


def _nowhere() -> ServerAddress:
    raise ServerNotRunningError("no server runs")


def value(page: str, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == name and sample.labels.items() >= labels.items():
                return sample.value
    return None


@pytest.mark.parametrize("headers", [{}, OPENMETRICS], ids=["text", "openmetrics"])
def test_exporter_forwards_server_metrics_without_renaming_them(registry: Registry, headers: dict[str, str]) -> None:
    with page_of(registry, (200, SERVER_PAGE)) as url:
        page = httpx.get(url, headers=headers).text
    assert "svc_server_up 1.0" in page
    for line in SERVER_PAGE.splitlines():
        if not line.startswith("#"):
            assert line.partition(" # ")[0] in page


def test_exporter_forwards_exemplars(registry: Registry) -> None:
    with page_of(registry, (200, SERVER_PAGE)) as url:
        assert '# {request_id="req-7"} 0.5' in httpx.get(url, headers=OPENMETRICS).text


@pytest.mark.parametrize(
    ("page", "up", "readable"),
    [
        (None, 0, 0),
        ((500, "the proxy's own"), 0, 0),
        ((401, ""), 1, 0),
        ((200, "<html>another server</html>"), 1, 0),
        ((200, SERVER_PAGE), 1, 1),
    ],
    ids=["none", "500", "401", "html", "metrics"],
)
def test_registry_and_training_metrics_are_exported_whether_or_not_the_server_page_is_readable(
    registry: Registry, page: tuple[int, str] | None, up: float, readable: float
) -> None:
    make_version(registry, 1)
    with page_of(registry, page) as url:
        answer = httpx.get(url)
    assert answer.status_code == 200
    assert value(answer.text, "svc_server_up") == up
    assert value(answer.text, "svc_server_page_readable") == readable
    assert value(answer.text, "svc_registry_version_size_bytes", model="tuned", version="1")
    assert value(answer.text, "svc_training_loss", model="tiny") == 0.25


def test_exporter_fails_if_the_port_is_in_use(registry: Registry) -> None:
    with (
        page_of(registry, None) as url,
        pytest.raises(BusyError, match="is in use"),
        exporting(registry, _store(registry), _home(registry), _nowhere, "127.0.0.1", httpx.URL(url).port or 0),
    ):
        pass


def test_exporter_fails_if_the_host_name_is_invalid(registry: Registry) -> None:
    with (
        pytest.raises(SettingsError, match="cannot listen on xxx"),
        exporting(registry, _store(registry), _home(registry), _nowhere, "x" * 70, 0),
    ):
        pass


def test_exporter_fails_if_the_address_does_not_belong_to_the_machine(registry: Registry) -> None:
    with (
        pytest.raises(SettingsError, match=r"cannot listen on 192\.0\.2\.1"),
        exporting(registry, _store(registry), _home(registry), _nowhere, "192.0.2.1", 0),
    ):
        pass


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_exporter_listens_on_ipv6(registry: Registry) -> None:
    with exporting(registry, _store(registry), _home(registry), _nowhere, "::1", 0) as url:
        assert url.startswith("http://[::1]:")
        assert "svc_server_up 0.0" in httpx.get(url).text


@pytest.mark.parametrize(
    "elsewhere", [pytest.param(False, id="of its home", marks=pytest.mark.matrix), pytest.param(True, id="elsewhere")]
)
def test_monitor_command_exports_server_metrics_and_stops_on_a_signal(tmp_path: Path, elsewhere: bool) -> None:
    command = [sys.executable, "-m", "svc.cli", "--home", str(tmp_path / "home"), "monitor", "--port", "0"]
    lock = tmp_path / ("other" if elsewhere else "home") / LOCK_FILE
    with (
        serving({"/metrics": (200, SERVER_PAGE)}) as url,
        hold_lock(lock, "the home", url=url),
        subprocess.Popen(
            [*command, *(["--server", url] if elsewhere else [])], stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        assert process.stderr is not None
        page = process.stderr.readline().split()[-1]
        assert "svc_server_up 1.0" in httpx.get(page, timeout=30).text
        process.terminate()
        assert process.wait(10) == 0


def test_remote_server_is_scraped_with_its_api_key(tmp_path: Path) -> None:
    secret, asked = new_secret("abcd0123"), list[str]()

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("authorization", ""))
            self.send_response(200)
            self.send_header("content-length", "6")
            self.end_headers()
            self.wfile.write(b"# EOF\n")

        def log_message(self, *arguments: object) -> None:
            """Stays silent."""

    key_file = tmp_path / "key"
    key_file.touch(mode=0o600)
    key_file.write_text(secret)
    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        address = ServerAddress.with_key(f"http://127.0.0.1:{server.server_port}", key_file, None)
        up, *_ = ServerPage(lambda: address).collect()
        thread.join()
    assert asked == [f"Bearer {secret}"]
    assert up.samples[0].value == 1
