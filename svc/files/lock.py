"""A lock file that names its holder. The kernel releases the lock when the holder dies, whatever the cause."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from svc.errors import BusyError

_TAKE_TIMEOUT_S = 0.5
_PAUSE_S = 0.01


@contextmanager
def locked_file(path: Path) -> Iterator[IO[str]]:
    """Lock a file exclusively and yield it, positioned at its end. A child process that inherits the open file also
    holds the lock.

    Raises:
        BlockingIOError: another process holds the lock, or has just removed the file.
    """
    with path.open("a+", encoding="utf-8") as file:
        _take(file)
        if not _lies_at(path, file):
            raise BlockingIOError(f"{path} was removed")
        yield file


def is_locked(path: Path) -> bool:
    """Return whether any process holds the lock, not counting processes that are only running `is_locked`."""
    try:
        with path.open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def hold_lock(path: Path, what: str, **info: Any) -> Iterator[None]:
    """Hold an exclusive lock for the duration of the `with` block.

    Args:
        what: noun for the locked object, used in error messages.
        info: JSON values that `lock_holder` returns to other processes, in addition to `pid`.

    Raises:
        BusyError: another process holds the lock; the error names that process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(locked_file(path))
        except BlockingIOError:
            holder = _read(path)
            raise BusyError(
                f"{what} is in use by process {holder.get('pid', 'unknown')}",
                todo=f"wait for that process, or stop it: kill {holder.get('pid', 'PID')}",
            ) from None
        file.truncate(0)
        json.dump({"pid": os.getpid(), **info}, file)
        file.flush()
        yield


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock during the `with` block, waiting until no other thread or process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def share_lock(path: Path) -> Iterator[None]:
    """Hold a shared lock for the duration of the `with` block, after waiting until no thread or process holds it
    exclusively. While the lock is shared, `locked_file` fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def lock_holder(path: Path) -> dict[str, Any] | None:
    """Return the lock holder's `pid` and info, or None if no process holds the lock."""
    return _read(path) if is_locked(path) else None


def _lies_at(path: Path, file: IO[str]) -> bool:
    """Return whether the path still refers to this file. The last lock holder may have removed or renamed the
    file's folder.
    """
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _take(file: IO[str]) -> None:
    """Acquire the lock, retrying because `is_locked` in another process may hold it for microseconds."""
    deadline = time.monotonic() + _TAKE_TIMEOUT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_PAUSE_S)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, FileNotFoundError):  # the holder has not written it yet, or has already removed it
        return {}
    return content if isinstance(content, dict) else {}
