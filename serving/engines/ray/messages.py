"""Messages between a server and an engine's actor: one JSON object per line, over TLS.

The server sends commands. The actor replies to each command. It also reports the phases of engine startup, the
engine's metrics once per second, and the engine's exit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

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
        target: a version in the artifact store, with its format; None for any other folder, which must have the same
            path on every machine.
        path: the folder's path on the server's machine.
    """

    target: Target | None
    path: Path


class Start(_Message):
    """Command that starts the engine.

    Attributes:
        artifacts: URL of the artifact store.
        spec: specification of the engine, with paths on the server's machine. The actor's machine must have the same
            capabilities, because the server has derived the launch options and the probes (checks of the loaded
            weights) from them.
        max_bytes: see `NodeModels`.
    """

    do: Literal["start"] = "start"
    artifacts: str
    model: ModelFiles
    spec: EngineSpec
    max_bytes: float | None = None


class Fetch(_Message):
    """Command that downloads a model folder, verifies it, and replies with its path on the actor's machine."""

    do: Literal["fetch"] = "fetch"
    artifacts: str
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

    kind: Literal["reply"] = "reply"
    id: int
    problem: Problem | None = None
    port: int | None = None
    plan: list[dict[str, Any]] | None = None
    path: Path | None = None


class Phase(_Message):
    """A phase of engine startup."""

    kind: Literal["phase"] = "phase"
    phase: EnginePhase


class Beat(_Message):
    """A periodic report of the engine's metrics; see `Engine` for their meaning."""

    kind: Literal["beat"] = "beat"
    memory: int | None = None
    processor_s: float = 0.0
    front_s: float | None = None


class Ended(_Message):
    """Message that the engine has exited."""

    kind: Literal["ended"] = "ended"
    code: int | None


Report = Annotated[Reply | Phase | Beat | Ended, Field(discriminator="kind")]
REPORT: TypeAdapter[Reply | Phase | Beat | Ended] = TypeAdapter(Report)


def line(message: _Message) -> bytes:
    """Return a message as one line of JSON."""
    return message.model_dump_json().encode() + b"\n"
