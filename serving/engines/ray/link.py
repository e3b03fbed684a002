"""The connection over which a server sends commands to an engine's actor: one JSON object per line, over TLS.

The server sends commands. The actor replies to each command. It also reports the phases of engine startup, the
engine's metrics once per second, and the engine's exit. A silent or closed connection shows that the actor is lost.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from svc.engine.address import TlsAddress
from svc.engine.state import EnginePhase
from svc.engine.vllm.launch import EngineSpec
from svc.errors import EngineError, IntegrityError, SvcError
from svc.version import Target

BEAT_S = 1.0
"""Seconds between consecutive reports from an actor."""
SILENCE_S = 8.0
"""Seconds without a report after which an actor counts as lost. A process that exits closes its connection immediately;
only a failed machine or network is silent."""
MAX_LINE = 2**20
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Placed:
    """An actor's address and port for commands, and its certificate in PEM format."""

    host: str
    port: int
    certificate: str


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelFiles(_Message):
    """Message part that identifies a model folder.

    Attributes:
        artifacts: URL of the artifact store.
        target: a version in the artifact store, with its format; None for any other folder, which must have the same
            path on every machine.
        path: the folder's path on the server's machine.
    """

    artifacts: str
    target: Target | None
    path: Path


class Start(_Message):
    """Command that starts the engine.

    Attributes:
        spec: specification of the engine, with paths on the server's machine. The actor's machine must have the same
            capabilities, because the server has derived the launch options and the probes (checks of the loaded
            weights) from them.
        max_bytes: see `NodeModels`.
    """

    do: Literal["start"] = "start"
    model: ModelFiles
    spec: EngineSpec
    max_bytes: float | None = None


class Fetch(_Message):
    """Command that downloads a model folder, verifies it, and replies with its path on the actor's machine."""

    do: Literal["fetch"] = "fetch"
    model: ModelFiles


class Simple(_Message):
    """A command without arguments. `hello` replies with the state of the engine; `stop` stops the engine and the
    actor.
    """

    do: Literal["hello", "sleep", "wake", "stop"]


Command = Annotated[Start | Fetch | Simple, Field(discriminator="do")]


class Request(_Message):
    """A command, with an id that its reply repeats."""

    id: int
    command: Command


class Problem(_Message):
    """An error reported by the actor. The server raises it as an `EngineError` or `IntegrityError`."""

    wrong: str
    expected: str = ""
    todo: str = ""
    integrity: bool = False

    @classmethod
    def of(cls, error: Exception, node: str) -> "Problem":
        """Return an error as a message that names the machine."""
        if not isinstance(error, SvcError):
            return cls(wrong=f"on {node}: {error!r}")
        integrity = isinstance(error, IntegrityError)
        return cls(wrong=f"on {node}: {error.wrong}", expected=error.expected, todo=error.todo, integrity=integrity)

    def error(self) -> SvcError:
        """Return the exception that the server raises for this problem."""
        kind = IntegrityError if self.integrity else EngineError
        return kind(self.wrong, expected=self.expected, todo=self.todo)


class Reply(_Message):
    """A reply to a command.

    Attributes:
        problem: why the command failed, or None.
        port: port of the running engine, or None.
        plan: launch options of the running engine; see `EnginePlan.rows`.
        path: path of a fetched folder.
    """

    id: int
    problem: Problem | None = None
    port: int | None = None
    plan: list[dict[str, Any]] | None = None
    path: Path | None = None


class Phase(_Message):
    """A phase of engine startup."""

    phase: EnginePhase


class Beat(_Message):
    """A periodic report of the engine's metrics; see `Engine` for their meaning."""

    memory: int | None = None
    processor_s: float = 0.0
    front_s: float | None = None


class Ended(_Message):
    """Message that the engine has exited."""

    code: int | None


_REPORT: TypeAdapter[Reply | Phase | Beat | Ended] = TypeAdapter(Reply | Phase | Beat | Ended)


def line(message: _Message) -> bytes:
    """Return a message as one line of JSON."""
    return message.model_dump_json().encode() + b"\n"


class ActorLink:
    """A connection to an actor.

    Attributes:
        address: the actor's address for commands.
        beat: the engine's most recently reported metrics.
        on_phase: called with each phase of engine startup.
    """

    def __init__(self, address: TlsAddress, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.address = address
        self._reader, self._writer = reader, writer
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._numbers = count()
        self._code: int | None = None
        self._lost = asyncio.Event()
        self.beat = Beat()
        self.on_phase: Callable[[EnginePhase], None] = lambda phase: None
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def to(cls, address: TlsAddress) -> "ActorLink":
        """Connect to an actor.

        Raises:
            OSError: the actor is not listening, or another process is listening at its address.
        """
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(
                address.host, address.port, ssl=address.context, server_hostname="", limit=MAX_LINE
            )
        return cls(address, reader, writer)

    async def ask(self, command: Command) -> Reply:
        """Send a command, and return its reply.

        Raises:
            SvcError: the command failed, or the actor was lost.
        """
        number = next(self._numbers)
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        try:
            if self._reading.done():
                raise _lost()
            self._writer.write(line(Request(id=number, command=command)))
            answer = await reply
        finally:
            del self._replies[number]
        if answer.problem is not None:
            raise answer.problem.error()
        return answer

    async def ended(self) -> int | None:
        """Wait until the engine exits or the actor is lost. Return the engine's exit code, or None if it is unknown."""
        await self._lost.wait()
        return self._code

    async def close(self) -> None:
        """Close the connection. The actor and its engine keep running."""
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading

    async def _read(self) -> None:
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    text = await self._reader.readline()
                if not text:
                    return
                self._heard(text)
        except (OSError, ValidationError, ValueError):
            return
        finally:
            self._lost.set()
            self._writer.transport.abort()
            for reply in self._replies.values():
                if not reply.done():
                    reply.set_exception(_lost())

    def _heard(self, text: bytes) -> None:
        report = _REPORT.validate_json(text)
        match report:
            case Reply():
                reply = self._replies.get(report.id)
                if reply is not None and not reply.done():
                    reply.set_result(report)
            case Phase():
                self.on_phase(report.phase)
            case Beat():
                self.beat = report
            case Ended():
                self._code = report.code
                self._lost.set()


def _lost() -> EngineError:
    return EngineError(
        "the engine's actor on the Ray cluster was lost: it exited, or its machine stopped responding",
        todo="check the machine: ray status",
    )
