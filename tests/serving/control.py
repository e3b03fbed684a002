"""The whole server except its process: the control plane over engine doubles, with the gateway in front."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine as Store

from serving.access.authenticator import Authenticator
from serving.engines.replica import Replica
from serving.http.connections import watched
from serving.models.deployment_builder import DeploymentBuilder
from serving.models.router import Router
from serving.rollout.leadership import Leadership
from serving.store_changes.changes import Changes
from serving.telemetry.deployment_metrics import DeploymentInstruments
from serving.telemetry.metrics import GatewayMetrics
from svc.engine.client import engine_transport
from svc.engine.probes import EngineFacts
from svc.engine.state import EngineState
from svc.identity.principal import Principal
from svc.registry.registry import Registry
from svc.settings.engine import AdapterSettings, EngineSettings, ReplicaRange
from svc.settings.serve import ServeSettings
from svc.settings.settings import Settings
from svc.store.desired import Desired, change_desired, read_desired
from svc.store.swaps import SwapResult, find_swap
from svc.version import Format, Target
from tests.new_store import new_store
from tests.serving.engine_double import EngineDouble
from tests.serving.engine_park import EnginePark, ParkSlots
from tests.serving.keyed import KnownCallers
from tests.serving.service import ClientsProtocol, gateway
from tests.serving.socket_server import running
from tests.serving.versions import FACTS, NAME, AliasBook, target
from tests.svc.engine.devices import AVX512

BODY: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "one two three"}]}


async def until(condition: Callable[[], object], timeout_s: float = 5.0, *, every_s: float = 0.005) -> None:
    """Wait until a condition holds, which is checked every `every_s` seconds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(every_s)


class Control:
    """A server whose desired version is 1.

    Args:
        home: folder of the registry and the store.
        sockets: folder with a short path.
        replicas: number of engines, or its limits.
        format: format in which versions are served.
        adapters: settings for adapters.
        store: store that other servers use too. By default, the home's.
        book: aliases that other servers use too.
        address: host name and port that the server reports.
        settings: fields of ServeSettings that differ from the default.

    Attributes:
        leaves: whether the engines are left running at the end.
        killed: whether `kill` was called.
        principals: principals by key secret, for clients that are created later.
    """

    def __init__(
        self,
        home: Path,
        sockets: Path,
        *,
        facts: EngineFacts = FACTS,
        replicas: int | ReplicaRange = 1,
        format: Format = Format.MERGED,
        adapters: AdapterSettings | None = None,
        store: Store | None = None,
        book: AliasBook | None = None,
        address: str = "gpu-1:8000",
        **settings: Any,
    ) -> None:
        self.sockets = sockets
        self.address = address
        self.format = format
        self.replicas = replicas
        self.settings = Settings(home=home, adapters=adapters or AdapterSettings(), serve=ServeSettings(**settings))
        self.book = book or AliasBook()
        self.address = address
        self.registry = Registry(home / "models", self.book)
        self.store = store or new_store(home)
        self.changes = Changes()
        self.leaves = self.killed = False
        self.principals: dict[str, Principal] = {}
        self.park = EnginePark(sockets)
        self.park.facts = facts
        self.assemble()

    def assemble(self) -> None:
        """Create the server's components, or recreate them after a stop, as in a restarted server."""
        settings = self.settings.model_copy(update={"engine": EngineSettings(replicas=self.replicas)})
        self.collector = CollectorRegistry()
        self.metrics = GatewayMetrics(self.collector)
        self.slots = ParkSlots(self.park, settings, self.registry, AVX512, list)
        self.leadership = Leadership(self.store, self.changes, self.address, lambda: [NAME])
        builder = DeploymentBuilder(
            settings,
            self.registry,
            self.store,
            self.changes,
            self.leadership,
            self.slots,
            self.metrics,
            DeploymentInstruments(self.collector),
            on_phase=lambda phase: None,
        )
        desired = read_desired(self.store, NAME) or change_desired(self.store, None, target(1, self.format), None)
        self.deployment = deployment = builder.build(desired, _make_no_room)
        self.admission, self.names, self.pool = deployment.admission, deployment.names, deployment.pool
        self.reconciler, self.balancer, self.alias = deployment.reconciler, deployment.balancer, deployment.alias
        self.router = Router()
        deployment.rollouts.split = partial(self.router.split, NAME)

    @asynccontextmanager
    async def run(self) -> AsyncIterator["Control"]:
        """Serve while the context is active. A defect that ends the loop fails the test."""
        await self.leadership.report()
        await self.start()
        parts = (
            self.leadership.run,
            self.reconciler.follow,
            self.reconciler.reviver.run,
            self.alias.run,
            self.deployment.removed.run,
        )
        self._tasks = tasks = [asyncio.create_task(part()) for part in parts]
        try:
            yield self
            for task in tasks:
                assert self.killed or not task.done(), task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            if not self.killed:
                await self.leadership.close()
            await self.stop(leave=self.leaves)
            assert self.park.alive == len(self.park.left)

    async def kill(self) -> None:
        """End all tasks as if the process had died: the server keeps its leases, which end on their own."""
        self.killed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def start(self) -> None:
        """Start a model as a server does before any requests arrive."""
        await self.reconciler.adopt()
        await self.slots.end_orphans()
        await self.reconciler.start()

    async def stop(self, *, leave: bool = False) -> None:
        """Stop the model as a server does."""
        await self.pool.stop(leave=leave)
        if not leave:
            await self.slots.end_orphans()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """Yield a client that reaches the gateway through a real server."""
        parts = gateway(
            self.deployment,
            self.settings,
            self.store,
            self.metrics,
            KnownCallers(Authenticator(self.store), self.principals, on_failure=self.metrics.authentication_failed),
            sources=self.pool.sources,
            router=self.router,
        )
        parts.request_log.start()
        socket = self.sockets / "gateway.sock"
        transport = engine_transport(socket, max_connections=None)
        async with (
            running(watched(parts.app), socket, ClientsProtocol),
            httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client,
        ):
            try:
                yield client
            finally:
                await asyncio.to_thread(parts.request_log.close)

    @property
    def double(self) -> EngineDouble:
        """Return the engine that was launched last."""
        return self.park.double

    @property
    def replica(self) -> Replica:
        """Return the first engine's replica, creating it if it does not exist yet."""
        if not self.pool.members:
            self.pool.fill()
        return self.pool.members[0]

    @property
    def state(self) -> EngineState:
        """Return the state of the first engine."""
        return self.replica.state

    def desired(self) -> Desired:
        """Return the desired state in the store."""
        desired = read_desired(self.store, NAME)
        assert desired is not None
        return desired

    def wish(self, number: int) -> Desired:
        """Make a version the desired one, as `svc promote` does."""
        seen = self.desired()
        return change_desired(self.store, seen, target(number, self.format), previous=seen.target)

    async def outcome(self, desired: Desired) -> SwapResult:
        """Wait until a swap ends and return its result."""
        async with asyncio.timeout(5):
            while True:
                swap = find_swap(self.store, NAME, desired.generation, server=self.leadership.server)
                if swap and swap.result:
                    return swap.result
                await asyncio.sleep(0.02)

    async def promote(self, number: int) -> SwapResult:
        """Promote a version, wait for the swap to end, and return its result."""
        return await self.outcome(self.wish(number))

    @property
    def steps(self) -> tuple[str, ...]:
        """Return the steps of the last swap."""
        swap = find_swap(self.store, NAME, server=self.leadership.server)
        return swap.steps if swap else ()

    async def serves(self, wanted: Target, timeout_s: float = 5.0) -> None:
        """Wait until the given target is serving."""
        await until(lambda: self.state is EngineState.READY and self.reconciler.actual.target == wanted, timeout_s)

    def sample(self, name: str, **labels: str) -> float:
        """Return the value of a metric, or 0 if it does not exist."""
        return self.collector.get_sample_value(name, labels) or 0.0


async def _make_no_room(target: Target) -> None:
    """Do nothing, because there is no other model that could be stopped."""


Make = Callable[..., Control]
"""Creates a Control from its settings and the number of registered answers that its versions have."""


@dataclass
class Answer:
    """One client's result: status, the version in the header, the versions in the text, and any error."""

    status: int
    version: str
    words: set[str]
    error: str | None = None


@dataclass
class Load:
    """Clients that send requests repeatedly.

    Attributes:
        answers: results of all requests.
    """

    client: httpx.AsyncClient
    answers: list[Answer] = field(default_factory=list)

    @asynccontextmanager
    async def run(self, *, streams: int = 6, plain: int = 3) -> AsyncIterator["Load"]:
        """Send requests while the context is active, and wait for the running requests when it ends."""
        going = asyncio.Event()

        async def ask_on(stream: bool) -> None:
            while not going.is_set():
                self.answers.append(await ask(self.client, stream=stream))

        tasks = [asyncio.create_task(ask_on(number < streams)) for number in range(streams + plain)]
        try:
            yield self
        finally:
            going.set()
            await asyncio.gather(*tasks)

    @property
    def versions(self) -> Counter[str]:
        """Return the number of answers by each version."""
        return Counter(answer.version for answer in self.answers)

    def check(self) -> None:
        """Check that no request failed, and that every answer came entirely from the version in its header."""
        assert self.answers
        for answer in self.answers:
            assert answer.error is None and answer.status == 200, answer
            assert {f"{NAME}@{word}" for word in answer.words} == {answer.version}, answer


async def ask(client: httpx.AsyncClient, *, stream: bool) -> Answer:
    """Send one request and return its result."""
    async with client.stream("POST", "/v1/chat/completions", json=BODY | {"stream": stream}) as response:
        version = response.headers.get("x-model-version", "")
        content = (await response.aread()).decode()
    if response.status_code != 200 or not stream:
        body = json.loads(content)
        error = body.get("error", {}).get("code")
        text = "" if error else body["choices"][0]["message"]["content"]
        return Answer(response.status_code, version, _versions(text), error)
    text, error = "", None
    for line in content.splitlines():
        with suppress(ValueError):
            event = json.loads(line.removeprefix("data: "))
            error = event.get("error", {}).get("code", error)
            for choice in event.get("choices", ()):
                text += choice["delta"].get("content", "")
    return Answer(response.status_code, version, _versions(text), error)


def _versions(text: str) -> set[str]:
    return {word.rpartition(".")[0] for word in text.split()}
