"""`svc serve`: takes the port and the home, runs the parts of the server, and ends what it started.

The port and the home are claimed before the engine starts, so that a second server is told at once, and not after
forty seconds.
"""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import uvicorn
from sqlalchemy import Engine as Store

from serving.assembly import Parts, assemble
from serving.deployments import OnFailure, OnReady
from serving.http.connections import limited_protocol, raise_descriptor_limit
from svc.engine.capabilities import Capabilities
from svc.errors import SvcError
from svc.listening import address_family, http_url, listen_error
from svc.lock import hold_lock
from svc.registry.registry import Registry
from svc.server_url import LOCK_FILE
from svc.settings import Settings
from svc.store.desired import Desired

_SEND_BUFFER_BYTES = 128 * 1024
_GRACE_S = 30  # running answers may end after SIGTERM


@dataclass(frozen=True, slots=True)
class Claim:
    """A home and a port that this process holds."""

    listener: socket.socket
    url: str


@contextmanager
def claim(settings: Settings) -> Iterator[Claim]:
    """Takes the port and the home, before anything is read or started.

    Raises:
        BusyError: another server uses this home or this port.
        SettingsError: the address is none of this machine's.
    """
    host, port = settings.serve.host, settings.serve.port
    with _bind(host, port) as listener:
        url = http_url(host, listener.getsockname()[1])
        with hold_lock(settings.home / LOCK_FILE, f"the home {settings.home}", url=url):
            yield Claim(listener, url)


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(address_family(host), socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it. The kernel would take megabytes of each answer, and nobody could tell who reads slowly.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    try:
        listener.bind((host, port))
        listener.listen()  # a port is only taken by who listens
    except OSError as error:
        listener.close()
        raise listen_error(host, port, error) from error
    return listener


async def serve(
    settings: Settings,
    registry: Registry,
    store: Store,
    wanted: Sequence[Desired],
    claim: Claim,
    *,
    capabilities: Capabilities,
    on_phase: Callable[[str], None],
    on_ready: OnReady,
    on_failure: OnFailure,
) -> None:
    """Serves until SIGTERM, SIGINT or SIGHUP; a second one ends it without waiting for the answers that run.

    SIGUSR1 ends it too, and leaves the engines to the next server, which takes them over.

    Args:
        wanted: what to load first, of each model.
        capabilities: of this device.
        on_phase: hears what a start is doing.
        on_ready: hears of each version when requests for it are answered.
        on_failure: hears why a model cannot be served.

    Raises:
        SvcError: no model can be served.
    """
    parts = assemble(
        settings, registry, store, capabilities, on_phase=on_phase, on_ready=on_ready, on_failure=on_failure
    )
    server = _Server(parts)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, partial(server.stop, leave=True))
    await server.run(claim.listener, wanted)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `serve`: they must also end a start that is under way."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


class _Server:
    """Runs the parts of one server, and ends them in order."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._stopping = asyncio.Event()
        self._leave = False
        self._http: _Uvicorn | None = None

    def stop(self, *, leave: bool = False) -> None:
        """Ends `run`: running answers may end; called again, they are cut off.

        Args:
            leave: the engines run on, for the next server.
        """
        self._leave = leave
        if self._stopping.is_set() and self._http is not None:
            self._http.force_exit = True
        self._stopping.set()

    async def run(self, listener: socket.socket, wanted: Sequence[Desired]) -> None:
        """Answers from the first moment, with 503 until an engine has started; returns when it was told to stop."""
        parts = self._parts
        parts.request_log.start()
        self._http = http = _Uvicorn(
            uvicorn.Config(
                parts.app,
                http=limited_protocol(raise_descriptor_limit()),
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # anybody can write them
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        works = (parts.deployments.run(wanted), parts.loop_lag.run(), parts.usage_writer.run())
        control = [asyncio.create_task(work) for work in works]
        stopping = asyncio.create_task(self._stopping.wait())
        defect = False
        try:
            # The others never end by themselves but for a defect, which must end the server and not leave half of it;
            # engines that answer are no worse for it, and the next server takes them over.
            done, _ = await asyncio.wait({serving, stopping, *control}, return_when=asyncio.FIRST_COMPLETED)
            defect = any(task.exception() and not isinstance(task.exception(), SvcError) for task in done)
        finally:
            # Control first: it would take the engine's end for a death.
            for task in (stopping, *control):
                task.cancel()
            await asyncio.wait({stopping, *control})
            http.should_exit = True
            await asyncio.wait({serving})
            try:
                await parts.deployments.stop(leave=defect or self._leave)
            finally:
                await asyncio.to_thread(parts.usage_writer.close)
                await asyncio.to_thread(parts.request_log.close)
        for task in done:
            task.result()
