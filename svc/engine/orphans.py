"""Engines that outlive their server. A later server finds one by its lock and its record.

The engine itself holds the lock: it inherits the locked file when it starts, so that the kernel releases
the lock when the engine exits for any reason, whatever happened to the server that started it. The
record names the process, its launch, and the weights that were last verified. This module knows nothing
about sockets, HTTP or versions.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from svc.errors import EngineError
from svc.files.disk import write_whole
from svc.files.lock import is_locked, locked_file

LOCK_FILE = "engine.lock"
RECORD_FILE = "engine.json"
STOP_GRACE_S = 10.0
_FOLDER = "folder"
_END_POLL_S = 0.05
_END_ROUNDS = 20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """Record of a running engine.

    Attributes:
        pid: id of the started process, which is also the number of its process group.
        boot, ticks: start of that process, which guards against a reused pid; see `start_of`.
        launch: digest of the engine's launch; see svc.engine.vllm.launch.launch_digest.
        plan: the launch choices, for display; see svc.engine.vllm.plan.EnginePlan.rows.
        holds: the last verified content, or None if unknown.
    """

    pid: int
    boot: str
    ticks: int
    launch: str
    plan: list[dict[str, Any]]
    holds: str | None = None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Yield the locked file, which a process started in the body inherits.

    Raises:
        EngineError: another engine holds the lock.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(locked_file(folder / LOCK_FILE))
        except BlockingIOError:
            pids = ", ".join(str(process.pid) for process in _holders(folder))
            raise EngineError(
                f"an engine is already running in {folder}, with processes {pids}",
                todo="stop these processes and retry",
            ) from None
        yield file


def write_record(folder: Path, record: EngineRecord) -> None:
    """Replace the engine's record atomically."""
    write_whole(folder / RECORD_FILE, json.dumps({_FOLDER: str(folder.resolve())} | asdict(record)).encode("utf-8"))


def read_record(folder: Path) -> EngineRecord | None:
    """Return the engine's record, or None if it is missing, damaged, or was copied together with its home."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text("utf-8"))
        if record.pop(_FOLDER) != str(folder.resolve()):
            return None
        return EngineRecord(**record | {"pid": int(record["pid"]), "ticks": int(record["ticks"])})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def find_engine(folder: Path) -> psutil.Process | None:
    """Return the process named in the record if it is still running and holds the lock."""
    record = read_record(folder)
    if record is None or not is_locked(folder / LOCK_FILE):
        return None
    try:
        process = psutil.Process(record.pid)
        return process if start_of(record.pid) == (record.boot, record.ticks) and runs(process) else None
    except (psutil.NoSuchProcess, ValueError):
        return None


def end_engine(folder: Path, known: psutil.Process | None = None) -> None:
    """Stop all processes of the engine last started in a folder: the first process, then its children.

    This is repeated until no process remains, at most 20 times, because a starting engine creates processes
    while it is being stopped.

    Args:
        known: the engine's first process, if the caller knows it, in case the folder was changed.
    """
    record = read_record(folder)
    engine = known if known and runs(known) else find_engine(folder)
    if engine:
        end_processes([engine])
    for _ in range(_END_ROUNDS):
        remaining = _group_of(engine.pid) if engine else _left_by(record) if record else []
        if is_locked(folder / LOCK_FILE):
            remaining += [process for process in _holders(folder) if process not in remaining]
        if not remaining:
            break
        end_processes(remaining)
    (folder / RECORD_FILE).unlink(missing_ok=True)


def start_of(pid: int) -> tuple[str, int]:
    """Return a process's start as boot id and clock ticks since boot, since the time of day may be adjusted.

    Raises:
        psutil.NoSuchProcess: there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return _BOOT_ID.read_text("utf-8").strip(), int(stat.rpartition(")")[2].split()[19])


def runs(process: psutil.Process) -> bool:
    """Return whether a process is running and not a zombie. In a container, zombies may never be reaped."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_processes(processes: list[psutil.Process]) -> None:
    """Send SIGTERM and wait for the processes to exit, then send SIGKILL to any still running after 10 s."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        deadline = time.monotonic() + STOP_GRACE_S
        while time.monotonic() < deadline:
            processes = [process for process in processes if runs(process)]
            if not processes:
                return
            time.sleep(_END_POLL_S)


def _holders(folder: Path) -> list[psutil.Process]:
    """Return the processes that have the lock file open, including an engine that has no record yet."""
    lock = str((folder / LOCK_FILE).resolve())

    def has_open(process: psutil.Process) -> bool:
        return process.pid != os.getpid() and any(file.path == lock for file in process.open_files())

    return _processes(has_open)


def _group_of(number: int) -> list[psutil.Process]:
    """Return a group's running processes. If an engine's first process is killed, its core remains."""
    return _processes(lambda process: os.getpgid(process.pid) == number and runs(process))


def _left_by(record: EngineRecord) -> list[psutil.Process]:
    """Return the remaining processes in the group of an engine that may have exited.

    A pid is not reused while a group has it, but may be reused after the whole group has exited. Only
    processes that began in the same boot, not before the engine, and run the same interpreter therefore
    belong to the engine.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        if start_of(record.pid) != (record.boot, record.ticks):
            return []
    python = os.path.realpath(sys.executable)

    def is_its_own(process: psutil.Process) -> bool:
        boot, ticks = start_of(process.pid)
        return boot == record.boot and ticks >= record.ticks and os.path.realpath(process.exe()) == python

    return _processes(is_its_own, _group_of(record.pid))


def _processes(
    fits: Callable[[psutil.Process], bool], among: Iterable[psutil.Process] | None = None
) -> list[psutil.Process]:
    """Return the processes for which `fits` is true, except those that have exited or belong to other users.

    Args:
        among: candidate processes, or None for all processes.
    """
    fitting = list[psutil.Process]()
    for process in psutil.process_iter() if among is None else among:
        with contextlib.suppress(psutil.Error, OSError):
            if fits(process):
                fitting.append(process)
    return fitting
