"""Implements `svc serve`: claims the port and the home folder, runs the server's components, and stops them.

Both are claimed before the engine starts, so that a second server fails immediately rather than after forty
seconds.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from serving.http.connections import raise_descriptor_limit
from serving.server.assembly import Parts
from serving.server.http_server import HttpServer
from serving.server.systemd_notify import ServiceManager
from serving.server.tls import Certificate
from svc.engine.vllm.folders import runtime_folder
from svc.errors import SettingsError, SvcError
from svc.files.lock import hold_lock
from svc.remote.listening import address_family, http_url, is_loopback, listen_error
from svc.remote.server_url import LOCK_FILE
from svc.settings.serve import ServeSettings
from svc.settings.settings import Settings
from svc.store.desired import Desired

log = logging.getLogger(__name__)

_SEND_BUFFER_BYTES = 128 * 1024
_SOCKET = "http.sock"
_NO_MANAGER = ServiceManager(None)
_LOCAL_CONNECTIONS = 64
"""Maximum number of connections to the local socket. They do not count toward the limit for clients, so that users on
this machine can always connect."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A home folder and a port claimed by this process.

    Attributes:
        local: the socket in the home folder. Requests through it do not need a key.
    """

    listener: socket.socket
    url: str
    local: socket.socket


@contextmanager
def claim(settings: Settings, *, has_keys: bool = False, inherited: socket.socket | None = None) -> Iterator[Claim]:
    """Claim the port and the home folder before anything is read or started.

    Args:
        settings: the settings. If there is an `inherited` socket, they must contain its address; see
            `at_address`.
        has_keys: whether API keys exist.
        inherited: socket on which the service manager is already listening, if any.

    Raises:
        BusyError: another server is using this home folder or this port.
        SettingsError: the address does not belong to this machine, or is not safe to listen on.
        EngineError: other users can access the folder that contains the socket.
    """
    require_safe(settings.serve, has_keys=has_keys)
    host, port = settings.serve.host, settings.serve.port
    path = runtime_folder(settings.home, "http") / _SOCKET
    with inherited or _bind(host, port) as listener:
        _prepare(listener)
        url = http_url(host, listener.getsockname()[1], tls=settings.serve.tls_certificate is not None)
        lock = hold_lock(settings.home / LOCK_FILE, f"the home folder {settings.home}", url=url, socket=str(path))
        with lock, _bind_local(path) as local:
            yield Claim(listener, url, local)


def at_address(settings: Settings, listener: socket.socket) -> Settings:
    """Return a copy of the settings with the host and port on which the service manager's socket listens."""
    host, port = listener.getsockname()[:2]
    return settings.model_copy(update={"serve": settings.serve.model_copy(update={"host": host, "port": port})})


def require_safe(serve: ServeSettings, *, has_keys: bool) -> None:
    """Check that other machines can neither use the server without a key nor intercept keys on the network.

    Raises:
        SettingsError: other machines could do so. The message says which protection is missing.
    """
    if is_loopback(serve.host):
        return
    if not has_keys:
        raise SettingsError(
            f"`serve.host` is {serve.host}, but no key exists, so any machine that can reach the server would have "
            "full access",
            expected="a loopback address such as 127.0.0.1 while no key exists",
            todo="create a key first: svc keys create --scope admin",
        )
    if serve.tls_certificate is None and not serve.behind_proxy:
        raise SettingsError(
            f"`serve.host` is {serve.host}, but API keys would be sent unencrypted",
            expected="`serve.tls_certificate` and `serve.tls_key`, or `serve.behind_proxy`",
            todo="set a certificate and its key, or the addresses of the TLS proxy in front of the server",
        )


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(address_family(host), socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # only a listening socket holds the port
    except OSError as error:
        listener.close()
        raise listen_error(host, port, error) from error
    return listener


def _prepare(listener: socket.socket) -> None:
    """Set the socket options that connections inherit from the listener."""
    # A token that waits for the acknowledgement of the one before arrives 40 ms late.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # By default the kernel buffers megabytes of each answer, which would hide slow clients.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)


@contextmanager
def _bind_local(path: Path) -> Iterator[socket.socket]:
    """Bind the Unix socket in the home folder.

    An earlier server's socket is removed first, which is safe because this process holds the home's lock.
    """
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


async def serve(
    parts: Parts,
    settings: ServeSettings,
    wanted: Sequence[Desired],
    claim: Claim,
    manager: ServiceManager = _NO_MANAGER,
) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP. The server then drains for `serve.drain_s`, during which it still accepts
    requests, and stops once the running requests have finished or a time limit has passed. A signal during the draining
    ends the draining. A signal after it stops the server without waiting for running requests.

    SIGUSR1 also stops the server, but leaves the engines and a fine-tuning job's training process running. The next
    server adopts them.

    Args:
        wanted: the initial desired state of each model.
        manager: the service manager to notify regularly while the server runs.

    Raises:
        SvcError: no model can be served.
    """
    await asyncio.to_thread(parts.authenticator.refresh)  # before the first request
    await parts.leadership.report()  # before it serves: others end what servers that do not run left open
    server = _Server(parts, settings, manager)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, partial(server.stop, leave=True))
    await server.run(claim, wanted)


class _Server:
    """Runs the components of one server, and stops them in order."""

    def __init__(self, parts: Parts, settings: ServeSettings, manager: ServiceManager) -> None:
        self._parts = parts
        self._manager = manager
        self._drain_s = settings.drain_s
        self._proxies = settings.behind_proxy
        self._most_per_address = settings.max_connections_per_address
        self._certificate: Certificate | None = None
        if settings.tls_certificate and settings.tls_key:
            self._certificate = Certificate(settings.tls_certificate, settings.tls_key)
        self._stopping = asyncio.Event()
        self._leave = False
        self._http: list[HttpServer] = []

    def stop(self, *, leave: bool = False) -> None:
        """Make `run` return once the server has drained and running requests have finished. While the server drains,
        another call ends the draining. After that, another call cancels the running requests.

        Args:
            leave: whether to keep the engines running for the next server.
        """
        self._leave = leave
        draining = self._parts.gateway.draining
        if self._drain_s and not draining.is_set():
            log.info("draining for %g s before stopping; send another signal to stop sooner", self._drain_s)
            draining.set()
            asyncio.get_running_loop().call_later(self._drain_s, self._stopping.set)
            return
        if self._stopping.is_set():
            for http in self._http:
                http.force_exit = True
        self._stopping.set()

    async def run(self, claim: Claim, wanted: Sequence[Desired]) -> None:
        """Run the server until it is stopped.

        Requests are answered once an earlier server's engines have been adopted. Until an engine has started, the
        response status is 503.
        """
        parts = self._parts
        parts.gateway.request_log.start()
        max_connections = raise_descriptor_limit()
        public = HttpServer(
            parts.gateway.app,
            max_connections,
            most_per_address=self._most_per_address or max(1, max_connections // 2),
            certificate=self._certificate,
            proxies=self._proxies,
        )
        local = HttpServer(parts.gateway.app, _LOCAL_CONNECTIONS)
        self._http = [public, local]
        serving = {
            asyncio.create_task(self._let_in(public, claim.listener)),
            asyncio.create_task(local.serve(sockets=[claim.local])),
        }
        works = [parts.deployments.run(wanted), self._manager.run(), *(work() for work in parts.works)]
        if self._certificate:
            works.append(self._certificate.follow())
        control = [asyncio.create_task(work) for work in works]
        stopping = asyncio.create_task(self._stopping.wait())
        defect = False
        try:
            # The other tasks return only after an unexpected error, which must stop the whole server and not half of
            # it; the engines are not affected, and the next server adopts them. One model's errors are handled in
            # serving.models.deployment.
            done, _ = await asyncio.wait({*serving, stopping, *control}, return_when=asyncio.FIRST_COMPLETED)
            defect = any(task.exception() and not isinstance(task.exception(), SvcError) for task in done)
        finally:
            self._manager.stopping()
            if parts.job_worker and (defect or self._leave):
                parts.job_worker.leave()
            # Stop the control tasks first: they would treat an engine's stop as a death.
            for task in (stopping, *control):
                task.cancel()
            await asyncio.wait({stopping, *control})
            await parts.leadership.close()
            for http in self._http:
                http.stop()
            await asyncio.wait(serving)
            try:
                await parts.deployments.stop(leave=defect or self._leave)
            finally:
                await asyncio.to_thread(parts.gateway.usage_writer.close)
                await asyncio.to_thread(parts.gateway.request_log.close)
                if parts.gateway.traces:
                    await asyncio.to_thread(parts.gateway.traces.close)
        for task in done:
            task.result()

    async def _let_in(self, http: HttpServer, listener: socket.socket) -> None:
        """Accept clients once running engines are adopted. Until then, connections wait in the listener's queue."""
        await self._parts.deployments.looked.wait()
        if not self._stopping.is_set():
            await http.serve(sockets=[listener])
