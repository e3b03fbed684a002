"""A lock file that says who holds it. The kernel gives it back when its holder dies, however it dies."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from svc.errors import BusyError

_TRIES = 20
_PAUSE_S = 0.01


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
    with path.open("a+", encoding="utf-8") as file:
        if not _take(file):
            holder = _read(path)
            raise BusyError(
                f"{what} is in use by process {holder.get('pid', 'unknown')}",
                todo=f"wait for it, or end it: kill {holder.get('pid', 'PID')}",
            )
        file.truncate(0)
        json.dump({"pid": os.getpid(), **info}, file)
        file.flush()
        yield


def lock_holder(path: Path) -> dict[str, Any] | None:
    """What the holder says of itself; None when nobody holds the lock."""
    try:
        file = path.open("r", encoding="utf-8")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read(path)
    return None


def _take(file: IO[str]) -> bool:
    """Tries for a moment: `lock_holder` of another process has the lock while it looks, some microseconds long."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE_S)
        else:
            return True
    return False


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError:  # the holder has not written yet
        return {}
    return content if isinstance(content, dict) else {}
