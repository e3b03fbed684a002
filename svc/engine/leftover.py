"""What tells a later server of an engine that runs: its lock, and a record of what it holds.

The engine itself holds the lock: it inherits the locked file when it is started, so that the kernel gives the lock back
when it is dead, however it died, and whatever became of the server that started it. The record names the process, what
it was started with, and what it was last proven to hold. Knows nothing of sockets, of HTTP or of versions.
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from svc.errors import EngineError

LOCK_FILE = "engine.lock"
RECORD_FILE = "engine.json"
STOP_GRACE_S = 10.0
_END_POLL_S = 0.05
_END_ROUNDS = 20
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What is known of an engine beside its folder.

    Attributes:
        pid: of the process that was started; the group of all its processes has the same number.
        created: when that process began, Unix seconds: guards against a number that is used again.
        launch: what it was started with, see svc.engine.launch.launch_digest.
        plan: how that was chosen, for people, see svc.engine.plan.EnginePlan.rows.
        holds: what it was last proven to hold; None while nobody knows.
    """

    pid: int
    created: float
    launch: str
    plan: list[dict[str, Any]]
    holds: str | None = None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[IO[bytes]]:
    """The locked file, for a process that is started in the body and inherits it.

    Raises:
        EngineError: another engine has it.
    """
    with (folder / LOCK_FILE).open("ab") as file:
        deadline = time.monotonic() + _LOOK_S  # whoever looks whether it is locked has it for a moment
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    pids = ", ".join(str(process.pid) for process in _holders(folder))
                    raise EngineError(
                        f"an engine runs in {folder} already, processes {pids}", todo="end them, then start again"
                    ) from None
            time.sleep(_END_POLL_S)
        yield file


def write_record(folder: Path, record: EngineRecord) -> None:
    """Replaces the record at once: a reader finds the old one or the new one."""
    new = folder / f"{RECORD_FILE}.new"
    new.write_text(json.dumps(asdict(record)), "utf-8")
    new.replace(folder / RECORD_FILE)


def read_record(folder: Path) -> EngineRecord | None:
    """The record; None where there is none, or it is damaged."""
    try:
        found = json.loads((folder / RECORD_FILE).read_text("utf-8"))
        return EngineRecord(**found | {"pid": int(found["pid"]), "created": float(found["created"])})
    except (OSError, ValueError, LookupError, TypeError):
        return None


def find_engine(folder: Path) -> psutil.Process | None:
    """The process in the record, if it runs still and holds the lock."""
    record = read_record(folder)
    if record is None or not _is_locked(folder):
        return None
    try:
        process = psutil.Process(record.pid)
        return process if process.create_time() == record.created and runs(process) else None
    except (psutil.NoSuchProcess, ValueError):
        return None


def end_engine(folder: Path) -> None:
    """Ends all processes of the engine that was started last in a folder: the first one, then what it left behind.

    Looks again until nothing is left: an engine that is starting begins processes while it is being ended.
    """
    record, engine = read_record(folder), find_engine(folder)
    left = [engine] if engine else _left(folder, record, sure=False)
    rounds = iter(range(_END_ROUNDS))
    while left and next(rounds, None) is not None:
        end_processes(left)
        left = _left(folder, record, sure=engine is not None)
    (folder / RECORD_FILE).unlink(missing_ok=True)


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


def _left(folder: Path, record: EngineRecord | None, *, sure: bool) -> list[psutil.Process]:
    """What runs still of an engine, by its group and by its lock."""
    found = _group_of(record, sure=sure) if record else []
    if _is_locked(folder):
        found += _holders(folder)
    return [process for process in found if runs(process)]


def _is_locked(folder: Path) -> bool:
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _holders(folder: Path) -> list[psutil.Process]:
    """Who has the lock's file open: also an engine whose server died before it wrote the record."""
    lock, found = str((folder / LOCK_FILE).resolve()), list[psutil.Process]()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and any(file.path == lock for file in process.open_files()):
                found.append(process)
    return found


def _group_of(record: EngineRecord, *, sure: bool) -> list[psutil.Process]:
    """The processes of the group that the engine began: its core outlives it where it is killed.

    A number is not given to a new process while a group has it. It may be when the whole group has ended.

    Args:
        sure: the engine's first process runs, so the group is its own. Otherwise only what is not older than the
            engine, and runs the same interpreter.
    """
    with contextlib.suppress(psutil.NoSuchProcess, ValueError):
        if psutil.Process(record.pid).create_time() != record.created:
            return []
    python = os.path.realpath(sys.executable)
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) != record.pid:
                continue
            if sure or (process.create_time() >= record.created and os.path.realpath(process.exe()) == python):
                found.append(process)
    return found
