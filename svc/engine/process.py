"""The life of one vLLM process on this machine: started, ready, ended, and never left behind.

A process record beside the socket names the child, so that the next start in the same folder ends an engine whose
parent was killed. Does not restart anything: that is the supervisor's decision.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil

from svc.engine.client import EngineClient
from svc.engine.launch import EngineSpec, command, environment
from svc.engine.phase import EnginePhase, PhaseReader
from svc.engine.plan import EnginePlan
from svc.errors import EngineError

_POLL_S = 0.1
_STOP_GRACE_S = 10.0
_END_POLL_S = 0.05


class Engine(Protocol):
    """What the swap and the supervisor need of an engine; a process here, or something elsewhere."""

    @property
    def client(self) -> EngineClient:
        """Its HTTP client."""

    @property
    def plan(self) -> EnginePlan | None:
        """How it was started; None before."""

    async def start(self, on_phase: Callable[[EnginePhase], None] = ...) -> None:
        """Returns when it answers."""

    async def wait(self) -> int:
        """Returns its exit code when it has ended."""

    async def stop(self) -> None:
        """Ends it, if it has not ended."""


class EngineProcess:
    """One vLLM server as a child process.

    Args:
        spec: what to start; its runtime folder must be private to this user.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.client = EngineClient.over_socket(spec.socket, spec.served_name)
        self.plan: EnginePlan | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, on_phase: Callable[[EnginePhase], None] = lambda phase: None) -> None:
        """Starts the server and returns when it answers.

        Args:
            on_phase: hears what it is doing.

        Raises:
            EngineError: it ended, or was not ready in `start_timeout_s`; names the log and its last error.
        """
        self._end_leftover()  # and its memory is free again for the plan
        self.plan = await asyncio.to_thread(lambda: self.spec.plan)
        self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        with self.spec.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command(self.spec),
                env=environment(self.spec),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._write_record(self._process.pid)
            await self._ready(self._process, on_phase)
        except BaseException:
            await self.stop()
            raise

    async def wait(self) -> int:
        """Returns the exit code when the server has ended; 0 when it was never started."""
        return await self._process.wait() if self._process else 0

    async def stop(self) -> None:
        """Ends the server and all its processes: first asked, then killed."""
        if self._process is not None:
            await asyncio.shield(_end_child(self._process))
        await self.client.close()
        self._record.unlink(missing_ok=True)
        self.spec.socket.unlink(missing_ok=True)

    async def _ready(self, process: asyncio.subprocess.Process, on_phase: Callable[[EnginePhase], None]) -> None:
        deadline = time.monotonic() + self.spec.settings.start_timeout_s
        phases, told = PhaseReader(self.spec.log), EnginePhase.PYTHON
        on_phase(told)
        while time.monotonic() < deadline:
            if process.returncode is not None:
                raise EngineError(
                    f"vLLM ended with code {process.returncode} before it was ready: {self._last_error()}",
                    todo=f"see {self.spec.log}",
                )
            if self.spec.socket.exists() and await self.client.healthy():
                return
            phase = await asyncio.to_thread(phases.look)
            if phase != told:
                on_phase(phase)
                told = phase
            await asyncio.sleep(_POLL_S)
        raise EngineError(
            f"vLLM was not ready after {self.spec.settings.start_timeout_s:.0f} s",
            todo=f"see {self.spec.log}; raise engine.start_timeout_s for a large model",
        )

    def _last_error(self) -> str:
        lines = self.spec.log.read_text("utf-8", errors="replace").splitlines()
        errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line)]
        return (errors or lines or ["no output"])[-1].strip()[-300:]

    @property
    def _record(self) -> Path:
        return self.spec.runtime / "engine.json"

    def _write_record(self, pid: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already: nothing can be left behind
            record = {"pid": pid, "created": psutil.Process(pid).create_time()}
            self._record.write_text(json.dumps(record), "utf-8")

    def _end_leftover(self) -> None:
        """Ends the engine of a parent that was killed; the creation time guards against a reused process id."""
        try:
            record = json.loads(self._record.read_text("utf-8"))
            if psutil.Process(record["pid"]).create_time() == record["created"]:
                _end_leftover_session(record["pid"])
        except (FileNotFoundError, ValueError, LookupError, TypeError, psutil.NoSuchProcess):
            pass
        self._record.unlink(missing_ok=True)
        self.spec.socket.unlink(missing_ok=True)


async def _end_child(leader: asyncio.subprocess.Process) -> None:
    """Ends our child and its session. Only asyncio may wait for the child itself: it would miss the exit code."""
    others = await asyncio.to_thread(_session_members, leader.pid)
    if leader.returncode is None:
        leader.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(leader.wait(), _STOP_GRACE_S)
    if leader.returncode is None:
        leader.kill()
        await leader.wait()
    await asyncio.to_thread(_end_processes, others)


def _end_leftover_session(pid: int) -> None:
    _end_processes([psutil.Process(pid), *_session_members(pid)])


def _session_members(pid: int) -> list[psutil.Process]:
    """The processes of a session without its leader."""
    return [process for process in psutil.process_iter() if process.pid != pid and _session(process.pid) == pid]


def _end_processes(processes: list[psutil.Process]) -> None:
    """SIGTERM, and SIGKILL after the grace."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            _signal(process, number)
        deadline = time.monotonic() + _STOP_GRACE_S
        while processes and time.monotonic() < deadline:
            processes = [process for process in processes if _runs(process)]
            time.sleep(_END_POLL_S)


def _runs(process: psutil.Process) -> bool:
    """A process that has ended stays in the table until its parent looks, and in a container nobody may ever look."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return -1


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
