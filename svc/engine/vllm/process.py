"""Manages the life cycle of a vLLM process on this machine, from its start or adoption until it is stopped.

An engine outlives a killed server, but does not run forever: the next server finds the engine's record, and adopts or
stops the engine. Restarting an engine is left to the supervisor. Waiting for files, locks and processes happens in
threads, because the event loop handles clients' requests.
"""

import asyncio
import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from svc.engine.client import EngineClient, engine_http
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.orphans import EngineRecord, end_engine, find_engine, locked, read_record, start_of, write_record
from svc.engine.state import EnginePhase
from svc.engine.vllm.headroom import backup_shortage
from svc.engine.vllm.health_checks import HealthChecks
from svc.engine.vllm.launch import EngineSpec, command, environment, launch_digest
from svc.errors import EngineError
from svc.settings.engine import Device

Result = TypeVar("Result")

_POLL_S = 0.1
_CPU_NICENESS = 5
"""Niceness of an engine on the CPU relative to the server. The engine's threads keep every core busy: with
equal priorities, the server's event loop had to wait 20 ms for a core in 1% of its iterations. With this niceness, it
waits 8 ms (docs/reliability.md)."""
_SIGNS = {
    EnginePhase.ARGUMENTS: rb"non-default args",
    EnginePhase.CORE: rb"Initializing a V1 LLM engine",
    EnginePhase.WEIGHTS: rb"Loading model|Starting to load model",
    EnginePhase.CACHE: rb"Loading weights took",
    EnginePhase.WARM_UP: rb"KV cache size",
    EnginePhase.SOCKET: rb"Starting vLLM server",
}
_ORDER = list(EnginePhase)


class PhaseReader:
    """Follows the startup of an engine in its log. Each call of `look` reads only the new lines.

    Args:
        log: file with vLLM's output since it was started. It may not exist yet.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._position = 0
        self._phase = EnginePhase.PYTHON

    def look(self) -> EnginePhase:
        """Return the current phase according to the log. It never goes back to an earlier phase."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._position)
                # The text after the last newline is not a complete line yet.
                new = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return self._phase
        self._position += len(new)
        reached = [phase for phase, sign in _SIGNS.items() if re.search(sign, new)]
        self._phase = max([self._phase, *reached], key=_ORDER.index)
        return self._phase


class EngineProcess:
    """A vLLM server that runs as a separate process and outlives the process that started it.

    Args:
        spec: specification of the engine. Its runtime folder must have owner-only permissions.

    Attributes:
        client: client for the server's own requests to the engine.
        plan: see `LastingEngine.plan`.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        checks = HealthChecks(spec.socket)
        self.client = EngineClient(engine_http(spec.socket), spec.served_name, checks=checks)
        self.plan: list[dict[str, Any]] | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._process: psutil.Process | None = None
        self._pidfd: int | None = None
        self._ended = asyncio.Event()
        self._has_backup = False

    @property
    def address(self) -> Path:
        """The Unix socket on which the engine listens."""
        return self.spec.socket

    @property
    def capabilities(self) -> EngineCapabilities:
        """Capabilities of the engine, which are known even before it starts."""
        return self.spec.engine_capabilities

    async def start(self, on_phase: Callable[[EnginePhase], None] = lambda phase: None) -> None:
        """Start the engine and wait until it accepts requests. First stop any engine left by an earlier server.

        Args:
            on_phase: called with each phase of the startup.

        Raises:
            EngineError: vLLM exited, or was not ready within `start_timeout_s`; the message names the log file
                and the last error in it.
        """
        await _in_own_thread(lambda: end_engine(self.spec.state))  # before the plan, which counts free memory
        self.plan = (await asyncio.to_thread(lambda: self.spec.plan)).rows()
        try:
            self._watch(await _uncancelled(self._spawn))
            await self._ready(on_phase)
        except BaseException:
            await self.stop()
            raise

    def _spawn(self) -> int:
        self._remove_sockets()
        log = self.spec.log
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():  # it may show why the previous engine died
            log.replace(log.with_name(f"{log.name}.1"))
        # asyncio's subprocesses are killed when their loop ends; an engine must outlive it.
        with log.open("wb") as output, locked(self.spec.state) as lock:
            self._child = subprocess.Popen(
                command(self.spec),
                env=environment(self.spec),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A group, so that Ctrl-C does not reach it. Not a session: the kernel's autogroup divides the cores
                # among sessions, and under Linux 6.18 a serving engine left a starting one 0.1 s in 68.
                process_group=0,
                pass_fds=[lock.fileno()],
            )
        if self.spec.device is Device.CPU:
            niceness = min(19, os.getpriority(os.PRIO_PROCESS, 0) + _CPU_NICENESS)
            os.setpriority(os.PRIO_PROCESS, self._child.pid, niceness)
        with contextlib.suppress(psutil.NoSuchProcess):  # it has already exited: nothing can be left behind
            self._process = process = psutil.Process(self._child.pid)
            started = start_of(process.pid)
            record = EngineRecord(process.pid, *started, launch_digest(self.spec), self.spec.plan.rows())
            write_record(self.spec.state, record)
        return self._child.pid

    def _watch(self, pid: int) -> None:
        """Notify the event loop when the process exits.

        This uses a pidfd, because polling would fail if no file descriptor is free.

        Raises:
            ProcessLookupError: there is no such process.
        """
        self._unwatch()
        self._ended = asyncio.Event()
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._unwatch)

    def _unwatch(self) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
        self._pidfd = None
        self._ended.set()

    async def orphan_holds(self) -> str | None:
        """Look for an engine that an earlier server left running with the same launch options.

        Return the identity of its loaded weights, or None if there is no such engine or its weights are unknown.
        """
        return await asyncio.to_thread(self._orphan_holds)

    def _orphan_holds(self) -> str | None:
        record = read_record(self.spec.state)
        if record is None or record.launch != launch_digest(self.spec) or not self.spec.socket.exists():
            return None
        return record.holds if find_engine(self.spec.state) else None

    async def adopt(self) -> None:
        """Adopt the engine that an earlier server left running, instead of starting a new one.

        Raises:
            EngineError: the engine is not responding, or has just exited.
        """
        self._process = await asyncio.to_thread(find_engine, self.spec.state)
        record = await asyncio.to_thread(read_record, self.spec.state)
        self.plan = record.plan if record else None
        if self._process is None or not await self.client.healthy():
            raise EngineError(
                f"the engine whose state folder is {self.spec.state} is not responding", todo="start a new engine"
            )
        try:
            self._watch(self._process.pid)
        except ProcessLookupError:
            raise EngineError(
                f"the engine whose state folder is {self.spec.state} has just exited", todo="start a new engine"
            ) from None

    async def fetch(self, folder: Path) -> None:
        """Do nothing, because the engine reads this machine's files."""

    async def record(self, holds: str | None) -> None:
        """Record which weights the engine has loaded, so that a later server can adopt the engine. Pass None if the
        weights are unknown.

        Raises:
            OSError: the record cannot be written.
        """
        await _uncancelled(lambda: self._record(holds))

    def _record(self, holds: str | None) -> None:
        record = read_record(self.spec.state)
        if record is not None:
            write_record(self.spec.state, replace(record, holds=holds))

    def memory(self) -> int | None:
        """Return the main memory used by the engine, in bytes, or None if it is not running.

        Memory pages shared with other processes are counted proportionally (PSS).
        """
        with contextlib.suppress(psutil.Error):  # it is exiting
            return sum(process.memory_full_info().pss for process in self._processes()) or None
        return None

    def processor_s(self) -> float:
        """Return the CPU time of the engine's processes, in seconds, or 0 if none is running."""
        with contextlib.suppress(psutil.Error):
            return sum(sum(process.cpu_times()[:2]) for process in self._processes())
        return 0.0

    def front_s(self) -> float | None:
        """Return the CPU time of vLLM's HTTP process, the engine's first process, in seconds. None if it is unknown."""
        with contextlib.suppress(psutil.Error):
            return sum(self._process.cpu_times()[:2]) if self._process else None
        return None

    def _processes(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)] if self._process else []

    async def wait(self) -> int | None:
        """Wait for the engine to exit, and return its exit code.

        Return 0 if the engine was never started, or None if it was adopted.
        """
        if self._child is None and self._process is None:
            return 0
        await self._ended.wait()
        return self._child.wait() if self._child else None

    async def stop(self) -> None:
        """Send SIGTERM to all processes of the engine, and SIGKILL to those that are still running after 10 seconds."""
        await asyncio.shield(_in_own_thread(self._end))
        self._unwatch()
        await self.client.close()

    def _remove_sockets(self) -> None:
        """Remove the engine's sockets, including those between its processes, because vLLM itself does not
        remove them.
        """
        for path in self.spec.runtime.glob("*"):
            if path.is_socket():
                path.unlink(missing_ok=True)

    def _end(self) -> None:
        if self._child or self._process or read_record(self.spec.state):
            end_engine(self.spec.state, self._process)
        if self._child:
            self._child.wait()
        self._remove_sockets()

    async def sleep(self) -> None:
        """Put the engine to sleep, which frees most of its GPU memory.

        Raises:
            EngineError: there is not enough free main memory for the weights, or vLLM failed.
        """
        # Torch keeps the memory of the first sleep for the next one.
        if not self._has_backup and (shortage := await asyncio.to_thread(backup_shortage, self.spec)):
            raise EngineError(f"the engine cannot be put to sleep: {shortage}")
        await self.client.sleep()
        self._has_backup = True

    async def wake(self) -> None:
        """Wake the engine and move its weights back to its GPU.

        Raises:
            EngineError: vLLM could not wake up.
        """
        await self.client.wake()

    async def leave(self) -> None:
        """Detach from the engine and leave it running, so that a server that starts later can adopt it.

        This object cannot be used afterwards.
        """
        if self._child:
            self._child.returncode = 0  # else Python warns that the child was not waited for
        self._child = self._process = None
        self._unwatch()
        await self.client.close()

    async def _ready(self, on_phase: Callable[[EnginePhase], None]) -> None:
        assert self._child is not None  # noqa: S101 - it was just spawned
        deadline = time.monotonic() + self.spec.settings.start_timeout_s
        phases, reported = PhaseReader(self.spec.log), EnginePhase.PYTHON
        on_phase(reported)
        while time.monotonic() < deadline:
            if self._child.poll() is not None:
                last_error = await asyncio.to_thread(self._last_error)
                raise EngineError(
                    f"vLLM exited with code {self._child.returncode} before it was ready: {last_error}",
                    todo=f"check {self.spec.log}",
                )
            if self.spec.socket.exists() and await self.client.healthy():
                return
            phase = await asyncio.to_thread(phases.look)
            if phase != reported:
                on_phase(phase)
                reported = phase
            await asyncio.sleep(_POLL_S)
        raise EngineError(
            f"vLLM was not ready after {self.spec.settings.start_timeout_s:.0f} s",
            todo=f"check {self.spec.log}; raise engine.start_timeout_s for a large model",
        )

    def _last_error(self) -> str:
        lines = self.spec.log.read_text("utf-8", errors="replace").splitlines()
        errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line)]
        return (errors or lines or ["no output"])[-1].strip()[-300:]


def _in_own_thread(work: Callable[[], Result]) -> "asyncio.Future[Result]":
    """Run `work` in a new thread. Stopping an engine can take a long time, which would block a shared thread."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-end")
    working = asyncio.get_running_loop().run_in_executor(thread, work)
    thread.shutdown(wait=False)  # the thread ends with its work
    return working


async def _uncancelled(work: Callable[[], Result]) -> Result:
    """Run `work` in a thread without letting a cancellation interrupt it.

    Cancellation takes effect once the work is done, so that the caller can undo the work.
    """
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        while not working.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({working})
        raise
