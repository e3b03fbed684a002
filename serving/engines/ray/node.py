"""The part of an engine that runs on a machine of the cluster: it starts vLLM there and makes it reachable over TLS.

It listens on two ports, both of which accept only one certificate. One port is for commands (link.py). The other
port, which is open only while vLLM runs, forwards bytes to vLLM's Unix socket. When this process dies, a guard stops
vLLM. This module knows nothing about Ray.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serving.engines.ray.files import NodeModels
from serving.engines.ray.identity import Identity, server_context
from serving.engines.ray.link import (
    BEAT_S,
    MAX_LINE,
    Beat,
    Ended,
    Fetch,
    Phase,
    Problem,
    Reply,
    Request,
    Simple,
    Start,
    line,
)
from serving.engines.ray.proxy import pass_bytes
from svc.engine.device import DeviceCapabilities, read_capabilities
from svc.engine.vllm.folders import runtime_folder
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.process import EngineProcess
from svc.errors import EngineError
from svc.ray.guard import Guard

log = logging.getLogger(__name__)

_MEMORY_INTERVAL_S = 10.0
"""Seconds between measurements of the engine's memory. Each measurement reads the page tables of all its processes."""


class EngineNode:
    """An engine on this machine, and the ports through which a server uses it.

    Args:
        name: name of the actor, also used in the names of the engine's folders.
        folder: folder for everything that the engine writes.
        host: address of this machine.
        identity: key pair of this process.
        peer: the server's certificate in PEM format.
        capabilities: function that returns the capabilities of this machine.
        make: function that returns an engine for a specification.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        host: str,
        identity: Identity,
        peer: str,
        *,
        capabilities: Callable[[Path], DeviceCapabilities] = read_capabilities,
        make: Callable[[EngineSpec], EngineProcess] = EngineProcess,
    ) -> None:
        self._name, self._folder, self._host = name, folder, host
        self._models = NodeModels(folder)
        self._tls = server_context(identity, peer)
        self._capabilities, self._make = capabilities, make
        self._engine: EngineProcess | None = None
        self._guard: Guard | None = None
        self._starting: asyncio.Task[None] | None = None
        self._front: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._finished = asyncio.Event()

    async def listen(self) -> tuple[asyncio.Server, int]:
        """Listen for commands, and return the listener and its port."""
        listener = await asyncio.start_server(self._serve, self._host, 0, ssl=self._tls, limit=MAX_LINE)
        return listener, int(listener.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Close all connections, and detach from the engine."""
        for task in self._tasks:
            task.cancel()
        if self._front is not None:
            self._front.close()
        for writer in self._writers.copy():
            writer.transport.abort()
        await self._dismiss_guard()
        self._models.close()

    async def finished(self) -> None:
        """Wait until the server has stopped this engine for good."""
        await self._finished.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        beating = asyncio.create_task(self._beat(writer))
        try:
            while text := await reader.readline():
                self._begin(self._answer(Request.model_validate_json(text), writer))
        except (OSError, ValidationError, ValueError):
            log.warning("closing a server's connection to this node after an error", exc_info=True)
        finally:
            self._writers.discard(writer)
            beating.cancel()
            writer.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        command, reply = request.command, Reply(id=request.id)
        try:
            match command:
                case Start():
                    self._starting = asyncio.create_task(self._start(command))
                    try:
                        await self._starting
                    except asyncio.CancelledError:
                        raise EngineError("the engine was stopped while it was starting") from None
                case Fetch():
                    path = await asyncio.to_thread(self._models.fetch, command.model)
                    reply = reply.model_copy(update={"path": path})
                case Simple(do="sleep"):
                    await self._running.sleep()
                case Simple(do="wake"):
                    await self._running.wake()
                case Simple(do="stop"):
                    await self._stop()
            if self._front is not None and self._engine is not None:
                port = int(self._front.sockets[0].getsockname()[1])
                reply = reply.model_copy(update={"port": port, "plan": self._engine.plan})
        except Exception as error:  # the server decides what it means
            log.exception("could not %s", command.do)
            reply = reply.model_copy(update={"problem": Problem.of(error, self._host)})
        with contextlib.suppress(OSError):
            writer.write(line(reply))
            await writer.drain()
        if command.do == "stop":
            self._finished.set()

    @property
    def _running(self) -> EngineProcess:
        if self._engine is None:
            raise EngineError("no engine runs")
        return self._engine

    async def _start(self, command: Start) -> None:
        found = await asyncio.to_thread(self._capabilities, self._folder)
        if found != command.spec.capabilities:
            raise EngineError(
                "this machine has different capabilities from the other machines in the cluster: "
                f"{found.model_dump_json()}",
                expected=command.spec.capabilities.model_dump_json(),
                todo="use ray.gpu_type to choose machines of one kind",
            )
        self._models.max_bytes = command.max_bytes
        model = await asyncio.to_thread(self._models.fetch, command.model)
        engine = self._engine = self._make(self._spec(command.spec, model))
        self._guard = await asyncio.to_thread(Guard, engine.spec.state)
        await engine.start(lambda phase: self._report(Phase(phase=phase)))
        serve = partial(pass_bytes, engine.address)
        self._front = await asyncio.start_server(serve, self._host, 0, ssl=self._tls)
        self._begin(self._watch(engine, self._front))

    def _spec(self, spec: EngineSpec, model: Path) -> EngineSpec:
        """Return a specification with the paths of this machine."""
        state = self._folder / "state" / self._name
        state.mkdir(parents=True, exist_ok=True)
        return replace(
            spec,
            model=model,
            runtime=runtime_folder(self._folder, self._name),
            state=state,
            log=self._folder / "logs" / f"{self._name}.log",
            cache=self._folder / "cache" / "vllm",
        )

    def _report(self, message: Phase | Ended) -> None:
        for writer in self._writers:
            writer.write(line(message))

    async def _watch(self, engine: EngineProcess, front: asyncio.Server) -> None:
        """Refuse connections as soon as the engine has exited, as a local engine's socket would, and stop the actor.

        The actor's resources are then free for the next engine.
        """
        code = await engine.wait()
        front.close()
        self._front = None
        self._report(Ended(code=code))
        if not self._stopping:
            await self._stop()
            self._finished.set()

    async def _stop(self) -> None:
        self._stopping = True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait({self._starting})
        if self._engine is not None:
            await self._engine.stop()
        await self._dismiss_guard()

    async def _dismiss_guard(self) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            await asyncio.to_thread(guard.dismiss)

    async def _beat(self, writer: asyncio.StreamWriter) -> None:
        memory, measured = None, float("-inf")
        while True:
            engine, beat = self._engine, Beat()
            if engine is not None:
                if time.monotonic() - measured >= _MEMORY_INTERVAL_S:
                    memory, measured = await asyncio.to_thread(engine.memory), time.monotonic()
                beat = Beat(memory=memory, processor_s=engine.processor_s(), front_s=engine.front_s())
            writer.write(line(beat))
            await asyncio.sleep(BEAT_S)
