"""What tells a later server of an engine that runs: its lock, and a record of what it holds.

The engine itself holds the lock: it inherits the locked file when it is started, so that the kernel gives the lock back
when it is dead, however it died, and whatever became of the server that started it. The record names the process, what
it was started with, and what it was last verified to hold. Knows nothing of sockets, of HTTP or of versions.
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
    """What is known of an engine beside its folder.

    Attributes:
        pid: of the process that was started; the group of all its processes has the same number.
        boot, ticks: when that process began, see `start_of`: guards against a number that is used again.
        launch: what it was started with, see svc.engine.vllm.launch.launch_digest.
        plan: how that was chosen, for people, see svc.engine.vllm.plan.EnginePlan.rows.
        holds: what it was last verified to hold; None while nobody knows.
    """

    pid: int
    boot: str
    ticks: int
    launch: str
    plan: list[dict[str, Any]]
    holds: str | None = None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """The locked file, for a process that is started in the body and inherits it.

    Raises:
        EngineError: another engine has it.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(locked_file(folder / LOCK_FILE))
        except BlockingIOError:
            pids = ", ".join(str(process.pid) for process in _holders(folder))
            raise EngineError(
                f"an engine runs in {folder} already, processes {pids}", todo="end them, then start again"
            ) from None
        yield file


def write_record(folder: Path, record: EngineRecord) -> None:
    """Replaces the record at once: a reader finds the old one or the new one."""
    write_whole(folder / RECORD_FILE, json.dumps({_FOLDER: str(folder.resolve())} | asdict(record)).encode("utf-8"))


def read_record(folder: Path) -> EngineRecord | None:
    """The record; None where there is none, or it is damaged, or a copy: the engine is that of another home then."""
    try:
        found = json.loads((folder / RECORD_FILE).read_text("utf-8"))
        if found.pop(_FOLDER) != str(folder.resolve()):
            return None
        return EngineRecord(**found | {"pid": int(found["pid"]), "ticks": int(found["ticks"])})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def find_engine(folder: Path) -> psutil.Process | None:
    """The process in the record, if it runs still and holds the lock."""
    record = read_record(folder)
    if record is None or not is_locked(folder / LOCK_FILE):
        return None
    try:
        process = psutil.Process(record.pid)
        return process if start_of(record.pid) == (record.boot, record.ticks) and runs(process) else None
    except (psutil.NoSuchProcess, ValueError):
        return None


def end_engine(folder: Path, known: psutil.Process | None = None) -> None:
    """Ends all processes of the engine that was started last in a folder: the first one, then what it left behind.

    Looks again until nothing is left: an engine that is starting begins processes while it is being ended.

    Args:
        known: its first process, for who has started or adopted it: whatever became of the folder.
    """
    record = read_record(folder)
    engine = known if known and runs(known) else find_engine(folder)
    if engine:
        end_processes([engine])
    for _ in range(_END_ROUNDS):
        left = _group_of(engine.pid) if engine else _left_by(record) if record else []
        if is_locked(folder / LOCK_FILE):
            left += [process for process in _holders(folder) if process not in left]
        if not left:
            break
        end_processes(left)
    (folder / RECORD_FILE).unlink(missing_ok=True)


def start_of(pid: int) -> tuple[str, int]:
    """When a process began: the machine's boot, and clock ticks since then. A time of day would move with the clock.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return _BOOT_ID.read_text("utf-8").strip(), int(stat.rpartition(")")[2].split()[19])


def runs(process: psutil.Process) -> bool:
    """A process that has ended stays in the table until its parent looks, and in a container nobody may ever look."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_processes(processes: list[psutil.Process]) -> None:
    """SIGTERM, and SIGKILL after the grace."""
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
    """Who has the lock's file open: also an engine whose server died before it wrote the record."""
    lock = str((folder / LOCK_FILE).resolve())
    return _processes(lambda one: one.pid != os.getpid() and any(file.path == lock for file in one.open_files()))


def _group_of(number: int) -> list[psutil.Process]:
    """The processes of a group: an engine's core outlives it where it is killed."""
    return _processes(lambda one: os.getpgid(one.pid) == number and runs(one))


def _left_by(record: EngineRecord) -> list[psutil.Process]:
    """What runs still of the group of an engine that may have ended.

    A number is not given to a new process while a group has it. It may be when the whole group has ended: only what
    began in the same boot, no earlier than the engine, and runs the same interpreter is its own.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        if start_of(record.pid) != (record.boot, record.ticks):
            return []
    python = os.path.realpath(sys.executable)

    def is_its_own(one: psutil.Process) -> bool:
        boot, ticks = start_of(one.pid)
        return boot == record.boot and ticks >= record.ticks and os.path.realpath(one.exe()) == python

    return _processes(is_its_own, _group_of(record.pid))


def _processes(
    fits: Callable[[psutil.Process], bool], among: Iterable[psutil.Process] | None = None
) -> list[psutil.Process]:
    """Those that fit; one that has ended, or is somebody else's, does not.

    Args:
        among: these; None: all.
    """
    found = list[psutil.Process]()
    for process in psutil.process_iter() if among is None else among:
        with contextlib.suppress(psutil.Error, OSError):
            if fits(process):
                found.append(process)
    return found
