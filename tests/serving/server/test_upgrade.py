"""Tests replacing a server with the next one, as after installing a release, without any client noticing.

Uses real processes on a socket that outlives them, as under systemd. The engine double is a process too.
"""

import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from svc.engine.orphans import end_engine, find_engine
from svc.engine.vllm.folders import state_folder
from svc.registry.registry import Registry
from tests.service_manager import ServiceManager, service_manager
from tests.serving.versions import NAME, AliasBook, make_version

pytestmark = pytest.mark.slow

CLIENTS = 8
RESTARTS = 2
SCALE_PAGE = Path(__file__).parents[3] / "docs" / "scale.md"
HAPROXY = shutil.which("haproxy") or "/usr/sbin/haproxy"
FRONTEND = """
frontend clients
    mode http
    bind 127.0.0.1:{port}
    timeout client 60s
    default_backend tuneserve
"""
BODY = {"model": NAME, "messages": [{"role": "user", "content": "one two three"}]}


class Clients:
    """Clients that send requests until they are stopped.

    Args:
        kept: number of clients that keep their connection; all others open a new connection for each
            request.

    Attributes:
        answers: number of answers by kind, which is a version or an error.
    """

    def __init__(self, url: str, *, kept: int) -> None:
        self._url = url
        self._going = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number < kept,)) for number in range(CLIENTS)]
        self.answers: Counter[str] = Counter()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Run the clients while the context is active."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._going.set()
            for thread in self._threads:
                thread.join()

    def wait_for(self, more: int) -> None:
        """Wait until a number of additional requests have been answered or have failed."""
        wanted, given_up = self.answers.total() + more, time.monotonic() + 60
        while self.answers.total() < wanted:
            assert time.monotonic() < given_up, self.answers
            time.sleep(0.01)

    def _ask(self, keep: bool) -> None:
        limits = httpx.Limits(max_keepalive_connections=int(keep))
        with httpx.Client(timeout=60, trust_env=False, limits=limits) as client:
            while not self._going.is_set():
                try:
                    answer = client.post(f"{self._url}/v1/chat/completions", json=BODY)
                    self.answers[answer.headers["x-model-version"] if answer.is_success else answer.text] += 1
                except httpx.HTTPError as error:
                    self.answers[repr(error)] += 1


class Service:
    """The server of one home, run by a service manager."""

    def __init__(self, manager: ServiceManager, home: Path, sockets: Path) -> None:
        self.manager = manager
        self.home = home
        self._sockets = sockets
        self._log = home / "serve.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and return once it reports that it is ready."""
        command = [sys.executable, "-m", "tests.serving.server_process", str(self.home)]
        with self._log.open("ab") as output:
            self.process = self.manager.start(command, output, {"TMPDIR": str(self._sockets)})
        try:
            self.manager.wait_for("READY=1")
        except TimeoutError:
            raise AssertionError(self._log.read_text("utf-8")) from None

    def end(self, number: signal.Signals) -> None:
        """Stop the server with a signal and return once it has stopped."""
        assert self.process is not None
        self.process.send_signal(number)
        assert self.process.wait(60) == 0, self._log.read_text("utf-8")

    @property
    def engine(self) -> psutil.Process | None:
        """Return the engine of its model, or None if there is none."""
        return find_engine(state_folder(self.home, 0))


@pytest.fixture
def service(memory_folder: Path, socket_folder: Path) -> Iterator[Service]:
    """Yield a server that serves version 1."""
    with running_service(memory_folder, socket_folder) as service:
        yield service


@contextmanager
def running_service(home: Path, sockets: Path) -> Iterator[Service]:
    """Run a server that serves version 1.

    Args:
        sockets: an empty folder with a short path.
    """
    make_version(Registry(home / "models", AliasBook()), 1)
    with service_manager(sockets) as manager:
        service = Service(manager, home, sockets)
        try:
            service.start()
            yield service
        finally:
            if service.process and service.process.poll() is None:
                service.process.kill()
                service.process.wait()
            end_engine(state_folder(home, 0))


@contextmanager
def running_haproxy(folder: Path, servers: list[str]) -> Iterator[str]:
    """Run HAProxy with the configuration in docs/scale.md, but ten times as many checks, and yield its URL.

    Args:
        servers: host and port of each server.
    """
    found = re.search(r"```text\n# haproxy.cfg[^\n]*\n(.*?)```", SCALE_PAGE.read_text("utf-8"), re.DOTALL)
    assert found is not None
    backend = re.sub(r"    server .*\n", "", found[1]).replace("inter 2s", "inter 200ms")
    backend += "".join(f"    server {number} {address}\n" for number, address in enumerate(servers))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "haproxy.cfg"
    config.write_text(f"defaults\n    timeout connect 5s\n{FRONTEND.format(port=port)}{backend}", "utf-8")
    with subprocess.Popen([HAPROXY, "-f", str(config), "-db"]) as process:
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 30
            while not _answers(f"{url}/health"):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            yield url
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False


def test_no_connection_is_refused_and_no_request_fails_when_the_server_is_replaced(service: Service) -> None:
    clients, engine = Clients(service.manager.url, kept=CLIENTS // 2), service.engine
    assert engine is not None
    with clients.asking():
        for _ in range(RESTARTS):
            # A server that stopped immediately would answer only the requests that waited for it.
            clients.wait_for(2 * CLIENTS)
            service.end(signal.SIGUSR1)
            service.start()
        clients.wait_for(2 * CLIENTS)
    assert set(clients.answers) == {f"{NAME}@1"}
    assert service.engine == engine


def test_systemd_is_notified_that_the_server_is_alive_and_stopping(service: Service) -> None:
    service.manager.wait_for("WATCHDOG=1", timeout_s=5)
    service.end(signal.SIGTERM)
    service.manager.wait_for("STOPPING=1", timeout_s=5)
    assert service.engine is None


def test_no_request_fails_when_a_load_balancer_stops_sending_requests_while_the_server_drains(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVC_SERVE__DRAIN_S", "5")
    service.end(signal.SIGUSR1)
    service.start()
    clients = Clients(service.manager.url, kept=CLIENTS // 2)
    with clients.asking():
        clients.wait_for(CLIENTS)
        assert service.process is not None
        service.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{service.manager.url}/health", trust_env=False).json() != {"status": "draining"}:
            time.sleep(0.01)
        clients.wait_for(2 * CLIENTS)
    assert set(clients.answers) == {f"{NAME}@1"}
    assert service.process.wait(60) == 0
    assert service.engine is None


@pytest.mark.matrix
@pytest.mark.skipif(not Path(HAPROXY).exists(), reason="HAProxy is not installed: apt-get install haproxy")
def test_no_request_fails_during_a_rolling_replacement_of_servers_behind_haproxy(
    memory_folder: Path, socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVC_SERVE__DRAIN_S", "2")
    monkeypatch.setenv("SVC_SERVE__BEHIND_PROXY", '["127.0.0.1/32"]')
    monkeypatch.setenv("SVC_SERVE__ALLOWED_HOSTS", '["models.example.org"]')
    with ExitStack() as stack:
        services = []
        for name in "ab":
            home, sockets = memory_folder / name, socket_folder / name
            home.mkdir()
            sockets.mkdir()
            services.append(stack.enter_context(running_service(home, sockets)))
        addresses = [service.manager.url.removeprefix("http://") for service in services]
        url = stack.enter_context(running_haproxy(memory_folder, addresses))
        clients = Clients(url, kept=CLIENTS // 2)
        with clients.asking():
            for service in services:
                clients.wait_for(2 * CLIENTS)
                service.end(signal.SIGTERM)
                clients.wait_for(2 * CLIENTS)
                service.start()
            clients.wait_for(2 * CLIENTS)
    assert set(clients.answers) == {f"{NAME}@1"}
