"""The process that runs a fine-tuning job: `svc train` in its own session, so that it outlives the server.

A job's folder contains a record of its process, which lets a later server find the process. All descendants of the
process have a marker in their environment, so that they can be found even if their parents have died. Engines overwrite
the marker when they set their process title, so the engines' process ids are recorded while the process runs. This
module knows nothing about jobs or the store.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from svc.engine.orphans import runs, start_of
from svc.files.disk import write_whole

LOG_FILE, RECORD_FILE = "log", "process.json"
MARKER = "TUNESERVE_JOB_FOLDER"
"""Environment variable of a training process and all its descendants. It contains the path of the job's folder."""
_EARLIER_LOG = "log.1"
_NICENESS = 10
"""Amount by which the training's niceness exceeds the server's. The training keeps every core busy, so it gets a lower
priority than the server and CPU engines, which have a niceness of 5."""
_KILL_S = 30.0
_PAUSE_S = 0.02


@dataclass(frozen=True, slots=True)
class _Record:
    pid: int
    boot: str
    ticks: int


class TrainingProcess:
    """A training process that this server started or found.

    Args:
        child: the child process, if this server started it.
    """

    def __init__(self, folder: Path, pid: int, child: subprocess.Popen[bytes] | None) -> None:
        self._folder = folder
        self._pid = pid
        self._child = child
        self._noted = dict[int, tuple[str, int]]()

    @classmethod
    def start(cls, folder: Path, command: Sequence[str], environment: Mapping[str, str]) -> "TrainingProcess":
        """Start a training process, which writes its output to the job's folder. No other process of this job may be
        running; see `end_processes`.

        Raises:
            OSError: the process cannot be started, or the disk is full.
        """
        log = folder / LOG_FILE
        with suppress(FileNotFoundError):
            log.replace(folder / _EARLIER_LOG)
        with log.open("xb") as output:
            child = subprocess.Popen(
                command,
                cwd=folder,  # without a settings file
                env={**environment, MARKER: str(folder.resolve())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        with suppress(psutil.NoSuchProcess, ProcessLookupError):  # it has already exited
            os.setpriority(os.PRIO_PROCESS, child.pid, min(19, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS))
            boot, ticks = start_of(child.pid)
            record = {"pid": child.pid, "boot": boot, "ticks": ticks}
            write_whole(folder / RECORD_FILE, json.dumps(record).encode())
        return cls(folder, child.pid, child)

    @classmethod
    def find(cls, folder: Path) -> "TrainingProcess | None":
        """Return the running process that an earlier server started in a folder, or None if there is none."""
        record = _read_record(folder)
        return cls(folder, record.pid, None) if record is not None and _is_alive(record) else None

    @property
    def running(self) -> bool:
        """Whether the process is still running."""
        if self._child is not None:
            return self._child.poll() is None
        return TrainingProcess.find(self._folder) is not None

    @property
    def exit_code(self) -> int | None:
        """Exit code of a process that has exited, negative if a signal killed it. None if another server started it."""
        return None if self._child is None else self._child.returncode

    def interrupt(self) -> None:
        """Ask the process to write a checkpoint and to exit."""
        if self.running:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)

    def note_descendants(self) -> None:
        """Remember all descendants, so that `kill` finds them even if the process has already died."""
        with suppress(psutil.Error, OSError):
            for child in psutil.Process(self._pid).children(recursive=True):
                with suppress(psutil.Error):
                    self._noted[child.pid] = start_of(child.pid)

    def kill(self) -> None:
        """Kill the process and all its descendants, including orphaned ones, and wait until they have exited."""
        end_processes(self._folder, self._noted)
        if self._child is not None:
            self._child.wait()


def end_processes(folder: Path, noted: Mapping[int, tuple[str, int]] | None = None) -> None:
    """Kill all processes of a job, and wait until they have exited.

    The search is repeated until no process is left, because a process may create another one before it is killed.

    Args:
        folder: the job's folder.
        noted: start times of further processes of the job, as returned by `start_of`, keyed by process id.
    """
    record = _read_record(folder)
    sessions = set() if record is None or _is_reused(record) else {record.pid}
    deadline = time.monotonic() + _KILL_S
    while time.monotonic() < deadline and (processes := list(_processes(folder, sessions, noted or {}))):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(_PAUSE_S)
    (folder / RECORD_FILE).unlink(missing_ok=True)


def _processes(folder: Path, sessions: set[int], noted: Mapping[int, tuple[str, int]]) -> Iterator[psutil.Process]:
    """Yield all running processes of a job, and add to `sessions` the id of each session whose leader is one of them.

    These are the processes whose environment variable `MARKER` contains the job's folder, the processes in `noted`, the
    processes in `sessions`, and the descendants of all of these.
    """
    mark, own = str(folder.resolve()), dict[int, psutil.Process]()
    everyone = [process for process in psutil.process_iter() if process.pid != os.getpid()]
    for process in everyone:
        with suppress(psutil.Error, OSError):
            known = os.getsid(process.pid) in sessions or (
                process.pid in noted and start_of(process.pid) == noted[process.pid]
            )
            if runs(process) and (known or process.environ().get(MARKER) == mark):
                own[process.pid] = process
    for process in list(own.values()):
        with suppress(psutil.Error):
            own |= {child.pid: child for child in process.children(recursive=True) if runs(child)}
    for pid in own:
        with suppress(OSError):
            if os.getsid(pid) in own:
                sessions.add(os.getsid(pid))
    yield from own.values()


def _read_record(folder: Path) -> _Record | None:
    try:
        record = json.loads((folder / RECORD_FILE).read_text("utf-8"))
        return _Record(int(record["pid"]), str(record["boot"]), int(record["ticks"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _is_alive(record: _Record) -> bool:
    with suppress(psutil.NoSuchProcess, ValueError):
        return start_of(record.pid) == (record.boot, record.ticks) and runs(psutil.Process(record.pid))
    return False


def _is_reused(record: _Record) -> bool:
    """Return whether a recorded process id now belongs to another process, or was recorded before a reboot."""
    with suppress(psutil.NoSuchProcess):
        return start_of(record.pid) != (record.boot, record.ticks)
    return start_of(os.getpid())[0] != record.boot
