"""The connection over which a server sends commands to an actor. It also shows whether the actor is alive."""

import asyncio
import contextlib
from collections.abc import Callable
from itertools import count

from pydantic import ValidationError

from serving.engines.ray.messages import (
    MAX_LINE,
    REPORT,
    SILENCE_S,
    Beat,
    Command,
    Ended,
    Phase,
    Reply,
    Request,
    line,
)
from svc.engine.address import TlsAddress
from svc.engine.state import EnginePhase
from svc.errors import EngineError

_CONNECT_TIMEOUT_S = 5.0


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
        report = REPORT.validate_json(text)
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
