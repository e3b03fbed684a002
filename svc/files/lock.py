"""A lock file that says who holds it. The kernel gives it back when its holder dies, however it dies."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from svc.errors import BusyError

_LOOK_S = 0.5
_PAUSE_S = 0.01


@contextmanager
def locked_file(path: Path) -> Iterator[IO[str]]:
    """The exclusively locked file for the body, at its end; a process that inherits it holds the lock too.

    Raises:
        BlockingIOError: another process holds it, or has removed it in that moment.
    """
    with path.open("a+", encoding="utf-8") as file:
        _take(file)
        if not _lies_at(path, file):
            raise BlockingIOError(f"{path} was removed")
        yield file


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock; another that looks at the same time does not count."""
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
    """Holds an exclusive lock for the body.

    Args:
        what: the thing that is locked, for the error's text.
        info: JSON values that `lock_holder` gives to others, beside `pid`.

    Raises:
        BusyError: another process holds it; names the process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(locked_file(path))
        except BlockingIOError:
            holder = _read(path)
            raise BusyError(
                f"{what} is in use by process {holder.get('pid', 'unknown')}",
                todo=f"wait for it, or end it: kill {holder.get('pid', 'PID')}",
            ) from None
        file.truncate(0)
        json.dump({"pid": os.getpid(), **info}, file)
        file.flush()
        yield


def lock_holder(path: Path) -> dict[str, Any] | None:
    """What the holder says of itself; None when nobody holds the lock."""
    return _read(path) if is_locked(path) else None


def _lies_at(path: Path, file: IO[str]) -> bool:
    """Whether others that lock the path find this file: whoever had it may have removed or renamed its folder."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _take(file: IO[str]) -> None:
    """Tries for a moment: `is_locked` of another process has the lock while it looks, some microseconds long."""
    deadline = time.monotonic() + _LOOK_S
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
    except (ValueError, FileNotFoundError):  # the holder has not written yet, or has removed it
        return {}
    return content if isinstance(content, dict) else {}
