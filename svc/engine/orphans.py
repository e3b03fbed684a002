"""Finds and stops engines that have outlived their server, using a lock and a record.

The lock is held by the engine itself, which inherits the locked file when it starts. The kernel
therefore releases the lock when the engine exits for any reason, whatever has happened to the server
that started it. The record contains the process id, the launch options, and the weights that were last
verified. This module knows nothing about sockets, HTTP or versions.
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
    """Record of a running engine, with which a later server can find the engine.

    Attributes:
        pid: id of the first process, which is also the id of its process group.
        boot, ticks: start time of that process, which guards against a reused pid; see `start_of`.
        launch: digest of the engine's launch options; see svc.engine.vllm.launch.launch_digest.
        plan: the launch options, for display; see svc.engine.vllm.plan.EnginePlan.rows.
        holds: identity of the weights that were last verified to be loaded, or None if unknown.
    """

    pid: int
    boot: str
    ticks: int
    launch: str
    plan: list[dict[str, Any]]
    holds: str | None = None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Lock an engine's folder and yield the locked file, which a process started within the context can inherit.

    Raises:
        EngineError: another engine holds the lock.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(locked_file(folder / LOCK_FILE))
        except BlockingIOError:
            pids = ", ".join(str(process.pid) for process in _holders(folder))
            raise EngineError(
                f"a running engine already uses the folder {folder} (processes: {pids})",
                todo="stop these processes and retry",
            ) from None
        yield file


def write_record(folder: Path, record: EngineRecord) -> None:
    """Write the record of an engine, atomically replacing any earlier record."""
    write_whole(folder / RECORD_FILE, json.dumps({_FOLDER: str(folder.resolve())} | asdict(record)).encode("utf-8"))


def read_record(folder: Path) -> EngineRecord | None:
    """Return the record of an engine, or None if it is missing or damaged.

    A record that was copied as part of a home folder is also ignored.
    """
    try:
        record = json.loads((folder / RECORD_FILE).read_text("utf-8"))
        if record.pop(_FOLDER) != str(folder.resolve()):
            return None
        return EngineRecord(**record | {"pid": int(record["pid"]), "ticks": int(record["ticks"])})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def find_engine(folder: Path) -> psutil.Process | None:
    """Return the engine process named in a folder's record if it is still running and the folder is locked."""
    record = read_record(folder)
    if record is None or not is_locked(folder / LOCK_FILE):
        return None
    try:
        process = psutil.Process(record.pid)
        return process if start_of(record.pid) == (record.boot, record.ticks) and runs(process) else None
    except (psutil.NoSuchProcess, ValueError):
        return None


def end_engine(folder: Path, known: psutil.Process | None = None) -> None:
    """Stop all processes of the engine that was last started in a folder, beginning with its first process.

    An engine that is still starting creates processes while it is being stopped. Stopping is therefore repeated until
    no process is left, up to 20 times.

    Args:
        known: the engine's first process, if the caller knows it. The engine can then be stopped even if the record in
            the folder is missing or names a different process.
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
    """Return a process's start time, as boot id and clock ticks since boot.

    The wall-clock time is not used, because it may be adjusted.

    Raises:
        psutil.NoSuchProcess: there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return _BOOT_ID.read_text("utf-8").strip(), int(stat.rpartition(")")[2].split()[19])


def runs(process: psutil.Process) -> bool:
    """Return whether a process is running and not a zombie. Containers may never reap their zombies."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_processes(processes: list[psutil.Process]) -> None:
    """Send SIGTERM to the processes, and SIGKILL to those that are still running after 10 seconds."""
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
    """Return the processes that have the lock file open. This finds an engine even if it has no record yet."""
    lock = str((folder / LOCK_FILE).resolve())

    def has_open(process: psutil.Process) -> bool:
        return process.pid != os.getpid() and any(file.path == lock for file in process.open_files())

    return _processes(has_open)


def _group_of(number: int) -> list[psutil.Process]:
    """Return the running processes of a process group.

    When an engine's first process is killed, its core process stays behind in the group.
    """
    return _processes(lambda process: os.getpgid(process.pid) == number and runs(process))


def _left_by(record: EngineRecord) -> list[psutil.Process]:
    """Return the processes that an engine has left in its process group, even if its first process has exited.

    The group's id may have been reused after the whole group exited. A process is therefore considered
    part of the engine only if it was started during the same boot as the engine, but not before the engine, and runs
    the same interpreter.
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
    """Return the processes for which `fits` is true, skipping any that have exited or belong to other users.

    Args:
        among: the processes to consider, or None for all processes.
    """
    fitting = list[psutil.Process]()
    for process in psutil.process_iter() if among is None else among:
        with contextlib.suppress(psutil.Error, OSError):
            if fits(process):
                fitting.append(process)
    return fitting
