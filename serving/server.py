"""`svc serve`: builds the server once, passes everything explicitly, and ends what it started.

The port and the home are claimed before the engine starts, so that a second server is told at once, and not after
forty seconds.
"""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, disable_created_metrics
from sqlalchemy import Engine as Store

from serving.admission import Admission
from serving.background.holdout import HoldoutRuns
from serving.background.scheduler import OwnQuestions, unfit_engine
from serving.background.scoring import LiveScores
from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from serving.engines.transport import connect
from serving.engines.verification import Verification
from serving.http.app import build_app
from serving.http.feedback import FeedbackIntake
from serving.http.inference import Gateway
from serving.rollout.production_alias import ProductionAlias
from serving.rollout.reconciler import Reconciler
from serving.rollout.swap import Swap
from serving.router import Routes
from serving.telemetry.engine_metrics import EngineMetrics
from serving.telemetry.machine_metrics import add_machine_metrics
from serving.telemetry.metrics import Traffic
from serving.telemetry.request_log import RecordWriter
from svc.engine.capabilities import Capabilities
from svc.engine.orphans import end_engine
from svc.engine.probes import engine_facts
from svc.engine.vllm.capacity import shortage
from svc.engine.vllm.launch import SOCKET_FILE, EngineSpec
from svc.engine.vllm.process import EngineProcess
from svc.engine.vllm.runtime import socket_folder, state_folder, state_folders
from svc.listening import address_family, http_url, listen_error
from svc.lock import hold_lock
from svc.registry.registry import Registry
from svc.server_url import LOCK_FILE
from svc.settings import Settings
from svc.store.desired import Desired
from svc.store.swaps import find_swap
from svc.version import Target

log = logging.getLogger(__name__)

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
    desired: Desired,
    claim: Claim,
    *,
    capabilities: Capabilities,
    on_phase: Callable[[str], None],
    on_ready: Callable[[Target], None],
) -> None:
    """Serves until SIGTERM, SIGINT or SIGHUP; a second one ends it without waiting for the answers that run.

    SIGUSR1 ends it too, and leaves the engines to the next server, which takes them over.

    Args:
        desired: what to load first.
        capabilities: of this device.
        on_phase: hears what the start is doing.
        on_ready: hears what is served, when requests are answered.

    Raises:
        SvcError: the version cannot be loaded.
    """
    server = _Server(settings, registry, store, desired, capabilities, on_phase)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, partial(server.stop, leave=True))
    await server.run(claim.listener, on_ready)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `serve`: they must also end a start that is under way."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


class _Server:
    """All parts of one server."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        store: Store,
        desired: Desired,
        capabilities: Capabilities,
        on_phase: Callable[[str], None],
    ) -> None:
        limits = settings.serve
        self._store = store
        self._stopping = asyncio.Event()
        self._leave = False
        self._http: _Uvicorn | None = None
        disable_created_metrics()  # type: ignore[no-untyped-call]
        metrics = CollectorRegistry()
        self._traffic = Traffic(metrics, exemplars=limits.exemplars)
        add_machine_metrics(metrics, settings.home, capabilities, settings.engine)
        self._records = RecordWriter(
            store,
            settings.records,
            on_stored=self._traffic.records_stored,
            on_dropped=self._traffic.records_dropped,
        )
        self._admission = Admission(
            max_running=limits.max_running, max_held=limits.max_held, hold_timeout_s=limits.hold_timeout_s
        )
        self._routes = Routes(desired.name)
        verification = Verification(registry, store, partial(engine_facts, settings.engine, capabilities))
        slots = _Slots(settings, capabilities, desired.name)
        self._pool = EnginePool(
            lambda replica, on_change: Replica(
                replica,
                partial(slots.engine, replica),
                connect(socket_folder(settings.home, replica) / SOCKET_FILE, silence_s=limits.request_timeout_s),
                verification,
                on_change,
                on_phase,
            ),
            orphans=slots,
            size=settings.engine.replicas,
            admission=self._admission,
            routes=self._routes,
            traffic=self._traffic,
            retire_timeout_s=limits.retire_timeout_s,
        )
        swap = Swap(
            registry=registry,
            verification=verification,
            pool=self._pool,
            admission=self._admission,
            routes=self._routes,
            choice=limits.swap,
            shortage=lambda target: slots.shortage(registry.artifact(target.version, target.format)),
            drain_timeout_s=limits.drain_timeout_s,
            retire_timeout_s=limits.retire_timeout_s,
        )
        self._alias = ProductionAlias(registry.tracking)
        self._reconciler = Reconciler(
            desired,
            store=store,
            pool=self._pool,
            swap=swap,
            routes=self._routes,
            traffic=self._traffic,
            alias=self._alias,
        )
        self._gateway = Gateway(
            lease=self._pool.lease,
            admission=self._admission,
            routes=self._routes,
            traffic=self._traffic,
            records=self._records,
            settings=limits,
        )
        questions = OwnQuestions(
            self._admission, self._pool, settings.holdout, off=unfit_engine(capabilities, settings.engine)
        )
        self._holdout = HoldoutRuns(
            questions,
            pool=self._pool,
            registry=registry,
            store=store,
            traffic=self._traffic,
            facts=verification.facts,
            every_hours=settings.holdout.every_hours,
        )
        self._scores = LiveScores(
            questions,
            busy=lambda: self._holdout.under_way,
            pool=self._pool,
            registry=registry,
            store=store,
            per_hour=settings.holdout.scored_per_hour if settings.records.content_share else 0,
        )
        self._engine_metrics = EngineMetrics(self._pool.sources)
        metrics.register(self._engine_metrics)

    def stop(self, *, leave: bool = False) -> None:
        """Ends `run`: running answers may end; called again, they are cut off.

        Args:
            leave: the engines run on, for the next server.
        """
        self._leave = leave
        if self._stopping.is_set() and self._http is not None:
            self._http.force_exit = True
        self._stopping.set()

    async def run(self, listener: socket.socket, on_ready: Callable[[Target], None]) -> None:
        """Answers from the first moment, with 503 until the engine has started; returns when it was told to stop."""
        self._records.start()
        app = build_app(
            self._gateway,
            feedback=FeedbackIntake(self._store, self._records, self._traffic.feedback_given),
            engine_metrics=self._engine_metrics,
            status=self.status,
        )
        self._http = http = _Uvicorn(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        works = (self._control(on_ready), self._alias.run(), self._holdout.run(), self._scores.run())
        control = [asyncio.create_task(work) for work in works]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            # The others never end by themselves but for a defect, which must end the server and not leave half of it.
            done, _ = await asyncio.wait({serving, stopping, *control}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Control first: it would take the engine's end for a death.
            for task in (stopping, *control):
                task.cancel()
            await asyncio.wait({stopping, *control})
            http.should_exit = True
            await asyncio.wait({serving})
            try:
                await self._pool.stop(leave=self._leave)
            finally:
                await asyncio.to_thread(self._records.close)
        for task in done:
            task.result()

    async def _control(self, on_ready: Callable[[Target], None]) -> None:
        await self._reconciler.start()
        on_ready(self._reconciler.actual.target)
        await self._reconciler.run()

    def status(self) -> Mapping[str, Any]:
        """What /svc/status shows."""
        actual, previous = self._reconciler.actual.target, self._reconciler.actual.previous
        swap = find_swap(self._store, actual.version.name)
        return {
            "model": actual.version.name,
            "version": str(actual.version),
            "format": actual.format.value,
            "previous": str(previous) if previous else None,
            "engine": {
                "state": self._pool.state.value,
                "restarts": self._pool.restarts,
                "last_error": self._reconciler.last_error,
                "plan": plan.rows() if (plan := self._pool.members[0].plan) else None,
            },
            "engines": [
                {
                    "replica": engine.replica,
                    "state": engine.state.value,
                    "version": str(target.version) if (target := engine.target) else None,
                    "running": engine.running,
                }
                for engine in self._pool.all
            ],
            "requests": {"running": self._admission.running, "held": self._admission.held},
            "holdout": self._holdout.status(actual),
            "last_swap": swap
            and {
                "to": str(swap.target),
                "started_at": swap.started_at.isoformat(timespec="seconds"),
                "outcome": swap.outcome and swap.outcome.value,
                "reason": swap.reason,
                "kind": swap.kind and swap.kind.value,
                "took_s": swap.took_s,
                "seconds": swap.seconds,
                "running": swap.running,
                "held": swap.held,
            },
            "pid": os.getpid(),
        }


@dataclass(frozen=True, slots=True)
class _Slots:
    """The places for engines of one home."""

    settings: Settings
    capabilities: Capabilities
    name: str

    def engine(self, number: int, model: Path) -> EngineProcess:
        return EngineProcess(self._spec(number, model))

    def shortage(self, model: Path) -> str | None:
        return shortage(self._spec(0, model))

    def numbers(self) -> list[int]:
        return list(state_folders(self.settings.home))

    def end(self, number: int) -> None:
        end_engine(state_folder(self.settings.home, number))

    def _spec(self, number: int, model: Path) -> EngineSpec:
        return EngineSpec(
            model=model,
            served_name=self.name,
            runtime=socket_folder(self.settings.home, number),
            state=state_folder(self.settings.home, number),
            log=self.settings.home / "logs" / f"engine-{number}.log",
            cache=self.settings.home / "cache" / "vllm",
            capabilities=self.capabilities,
            settings=self.settings.engine,
        )
