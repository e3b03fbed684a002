"""The server's interface to an engine on a machine of a Ray cluster. It implements svc.engine.engine.LastingEngine."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from serving.engines.ray.cluster import RayCluster
from serving.engines.ray.identity import Identity, client_context, make_identity
from serving.engines.ray.link import ActorLink, Fetch, ModelFiles, Placed, Reply, Simple, Start
from serving.engines.ray.record import RECORD_FILE, ActorRecord, end_actor, read_actor, write_actor
from svc.engine.address import TlsAddress
from svc.engine.client import EngineClient, engine_http
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.orphans import end_engine
from svc.engine.state import EnginePhase
from svc.engine.vllm.health_checks import HealthChecks
from svc.engine.vllm.launch import EngineSpec, launch_digest
from svc.errors import EngineError, SvcError
from svc.ray.need import Need
from svc.settings.engine import Device
from svc.settings.settings import Settings
from svc.version import Format, Target, VersionId

log = logging.getLogger(__name__)

Connection = TypeVar("Connection")

_ACTOR_START_S = 30.0
_STOP_TIMEOUT_S = 40.0
"""Maximum time for an actor to stop its engine, in seconds: two rounds of SIGTERM and SIGKILL, 10 s for each signal."""


@dataclass(frozen=True)
class Placement:
    """Location and resources of a server's engines.

    Attributes:
        need: resources that one engine needs.
        models: the registry's folder on this machine, which contains the model folders `NAME/N/FORMAT`.
    """

    cluster: RayCluster
    need: Need
    settings: Settings
    models: Path

    def files(self, folder: Path) -> ModelFiles:
        """Return the message part that tells an engine's machine which model folder to use."""
        target = None
        if folder.is_relative_to(self.models):
            name, number, format = folder.relative_to(self.models).parts
            target = Target(VersionId(name, int(number)), Format(format))
        return ModelFiles(artifacts=self.settings.artifacts.url or "", target=target, path=folder)


class RayEngine:
    """A vLLM server that an actor runs on another machine, and that outlives this process.

    Args:
        spec: specification of the engine. Its paths are on this machine. The actor's machine uses other paths.

    Attributes:
        plan: see `LastingEngine.plan`.
    """

    def __init__(self, spec: EngineSpec, placement: Placement) -> None:
        self.spec = spec
        self._placement = placement
        self.plan: list[dict[str, Any]] | None = None
        self._link: ActorLink | None = None
        self._client: EngineClient | None = None
        self._address: TlsAddress | None = None

    @property
    def client(self) -> EngineClient:
        """Client for the server's own requests to the engine.

        Raises:
            RuntimeError: the engine has neither been started nor adopted.
        """
        return _running(self._client)

    @property
    def address(self) -> TlsAddress:
        """The engine's host and port, with the TLS context for connecting to it.

        Raises:
            RuntimeError: the engine has neither been started nor adopted.
        """
        return _running(self._address)

    @property
    def capabilities(self) -> EngineCapabilities:
        """Capabilities of the engine, which are known even before it starts."""
        return self.spec.engine_capabilities

    def memory(self) -> int | None:
        """Return the main memory used by the engine, in bytes, as last reported, or None if it is unknown."""
        return self._link.beat.memory if self._link else None

    def processor_s(self) -> float:
        """Return the CPU time of the engine's processes, in seconds, as last reported."""
        return self._link.beat.processor_s if self._link else 0.0

    def front_s(self) -> float | None:
        """Return the CPU time of vLLM's HTTP process, in seconds, as last reported, or None if it is unknown."""
        return self._link.beat.front_s if self._link else None

    async def start(self, on_phase: Callable[[EnginePhase], None] = lambda phase: None) -> None:
        """Create an actor, start the engine on its machine, and wait until it accepts requests. Any earlier actor is
        stopped first.

        Raises:
            EngineError: no machine has the resources, or vLLM did not start there.
            SvcError: the machine could not fetch the model.
        """
        await asyncio.to_thread(end_engine, self.spec.state)  # of a server whose engines ran on this machine
        await asyncio.to_thread(end_actor, self.spec.state)
        placement, ray, identity = self._placement, self._placement.settings.ray, make_identity()
        name = f"{self.spec.served_name}-{self.spec.state.name}-{token_hex(4)}"
        record = ActorRecord(
            name=name, cluster=placement.cluster.address, certificate=identity.certificate, key=identity.key
        )
        try:
            await asyncio.to_thread(write_actor, self.spec.state, record)  # before it exists, so that it is ended
            placed = await placement.cluster.place(
                name, placement.need, str(ray.folder), identity.certificate, ray.wait_s + _ACTOR_START_S
            )
            link = await self._connect(placed, identity)
            link.on_phase = on_phase
            self._use(link, await link.ask(self._launch()))
            done = {"placed": placed, "launch": launch_digest(self.spec)}
            await asyncio.to_thread(write_actor, self.spec.state, record.model_copy(update=done))
            log.info("the engine of %s runs on %s", self.spec.served_name, placed.host)
        except BaseException:
            await self.stop()
            raise

    def _launch(self) -> Start:
        """Return the command that starts the engine. On a CPU, the engine uses as many cores as it has reserved."""
        spec, placement = self.spec, self._placement
        if placement.need.cpus and spec.settings.cores is None and spec.device is Device.CPU:
            cores = max(1, int(placement.need.cpus))
            spec = replace(spec, settings=spec.settings.model_copy(update={"cores": cores}))
        cache_gb = placement.settings.artifacts.cache_gb
        max_bytes = None if cache_gb is None else cache_gb * 1e9
        return Start(model=placement.files(spec.model), spec=spec, max_bytes=max_bytes)

    async def _connect(self, placed: Placed, identity: Identity) -> ActorLink:
        context = await asyncio.to_thread(client_context, identity, placed.certificate)
        try:
            self._link = await ActorLink.to(TlsAddress(placed.host, placed.port, context))
        except OSError as error:
            raise EngineError(
                f"the actor at {placed.host}:{placed.port} cannot be reached: {error!r}",
                expected="network access from this machine to all ports of the cluster's machines",
                todo="check firewalls and network policies",
            ) from error
        return self._link

    def _use(self, link: ActorLink, reply: Reply) -> None:
        """Set this object up to use the running engine that an actor has reported.

        Raises:
            EngineError: no engine is running.
        """
        if reply.port is None:
            raise EngineError(f"the actor at {link.address.host} runs no engine", todo="start a new engine")
        self._address = replace(link.address, port=reply.port)
        self._client = _NodeClient(self._address, self.spec.served_name, self._path_there)
        self.plan = reply.plan

    async def orphan_holds(self) -> str | None:
        """Look for an engine that an earlier server left running with the same launch options.

        Return the identity of its loaded weights, or None if there is no such engine or its weights are unknown.
        """
        record = await asyncio.to_thread(read_actor, self.spec.state)
        if record is None or record.launch != await asyncio.to_thread(launch_digest, self.spec):
            return None
        with contextlib.suppress(SvcError):
            _, reply = await self._hello(record)
            return None if reply.port is None else record.holds
        return None

    async def adopt(self) -> None:
        """Adopt the engine that an earlier server left running, instead of starting a new one.

        Raises:
            EngineError: the engine is not responding, or has just exited.
        """
        link, reply = await self._hello(await asyncio.to_thread(read_actor, self.spec.state))
        self._use(link, reply)
        if not await self.client.healthy():
            raise EngineError(f"the engine on {link.address.host} is not responding", todo="start a new engine")

    async def _hello(self, record: ActorRecord | None) -> tuple[ActorLink, Reply]:
        """Connect to a recorded actor, and ask for the state of its engine."""
        if record is None or record.placed is None:
            raise EngineError(
                f"{self.spec.state} has no record of an engine that was started before", todo="start a new engine"
            )
        identity = Identity(record.certificate, record.key)
        link = self._link or await self._connect(record.placed, identity)
        return link, await link.ask(Simple(do="hello"))

    async def fetch(self, folder: Path) -> None:
        """Download a model folder to the engine's machine, so that a reload is fast.

        Raises:
            SvcError: the machine could not download the folder.
        """
        await self._path_there(folder)

    async def _path_there(self, folder: Path) -> Path:
        """Return the path of a model folder on the engine's machine, after fetching and verifying it."""
        path = (await _running(self._link).ask(Fetch(model=self._placement.files(folder)))).path
        assert path is not None  # noqa: S101 - the reply to this command
        return path

    async def record(self, holds: str | None) -> None:
        """Record which weights the engine has loaded, so that a later server can adopt the engine. Pass None if the
        weights are unknown.

        Raises:
            OSError: the record cannot be written.
        """
        record = await asyncio.to_thread(read_actor, self.spec.state)
        if record is not None:
            changed = record.model_copy(update={"holds": holds})
            await asyncio.shield(asyncio.to_thread(write_actor, self.spec.state, changed))

    async def wait(self) -> int | None:
        """Wait until the engine exits, or its actor or machine is lost. Return its exit code, or None if unknown."""
        return await self._link.ended() if self._link else 0

    async def sleep(self) -> None:
        """Free the engine's GPU.

        Raises:
            EngineError: there is not enough free main memory for the weights, or vLLM failed.
        """
        await _running(self._link).ask(Simple(do="sleep"))

    async def wake(self) -> None:
        """Wake the engine and move its weights back to its GPU.

        Raises:
            EngineError: vLLM could not wake up.
        """
        await _running(self._link).ask(Simple(do="wake"))

    async def stop(self) -> None:
        """Stop the engine and its actor."""
        await asyncio.shield(self._stop())

    async def _stop(self) -> None:
        stopped = False
        if self._link is not None:
            with contextlib.suppress(SvcError, TimeoutError):
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await self._link.ask(Simple(do="stop"))  # the actor then ends itself
                    stopped = True
        await self.leave()
        if stopped:
            (self.spec.state / RECORD_FILE).unlink(missing_ok=True)
        else:
            await asyncio.to_thread(end_actor, self.spec.state)

    async def leave(self) -> None:
        """Detach from the engine and leave it running, so that a server that starts later can adopt it.

        This object cannot be used afterwards.
        """
        link, self._link = self._link, None
        if link is not None:
            await link.close()
        if self._client is not None:
            await self._client.close()


def _running(connection: Connection | None) -> Connection:
    """Return an engine's connection, unless it is None.

    Raises:
        RuntimeError: the engine has neither been started nor adopted.
    """
    if connection is None:
        raise RuntimeError("no engine runs")
    return connection


class _NodeClient(EngineClient):
    """A client that replaces the model folder paths in requests with the paths on the engine's machine.

    Args:
        path_there: function that downloads a model folder to the engine's machine, and returns its path there.
    """

    def __init__(self, address: TlsAddress, model: str, path_there: Callable[[Path], Any]) -> None:
        super().__init__(engine_http(address), model, checks=HealthChecks(address))
        self._path_there = path_there

    async def reload_weights(self, folder: Path, *, there: Path | None = None) -> None:
        await super().reload_weights(folder, there=there or await self._path_there(folder))

    async def load_adapter(self, name: str, folder: Path) -> None:
        await super().load_adapter(name, await self._path_there(folder))
