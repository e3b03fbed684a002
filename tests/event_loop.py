"""Detects what blocks an event loop: callbacks that compute for too long, and blocking calls."""

import asyncio
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

_MAX_CPU_S = 0.02
"""Maximum CPU time of a callback, in seconds, on a machine that parses `_REFERENCE` in `_REFERENCE_S`."""
_REFERENCE = json.dumps([[1e300] * 30_000, [{"a": 1}] * 10_000, "é" * 200_000])
_REFERENCE_S = 0.009
"""Seconds to parse `_REFERENCE` on an otherwise idle Xeon with AMX. Other VMs on the host can triple it."""
_WAITING = {"open", "subprocess.Popen", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "fcntl.flock"}
"""Audit events of calls that block on a disk, a lock or a process."""
_OF_PYTHON = (".py", ".pyc")
"""Extensions of Python modules, whose import at first use is not counted as a blocking call."""


def max_cpu_s() -> float:
    """Return a callback's CPU time limit in seconds, scaled up if this machine is slower than the reference."""
    took_s = []
    for _ in range(3):
        began = time.thread_time()
        json.loads(_REFERENCE)
        took_s.append(time.thread_time() - began)
    return _MAX_CPU_S * max(1.0, min(took_s) / _REFERENCE_S)


@dataclass
class LoopWatch:
    """Blocking activity observed in one thread's event loop.

    Attributes:
        slow: callbacks that computed for longer than `max_cpu_s`.
        waits: blocking calls.
    """

    thread: int = field(default_factory=threading.get_ident)
    slow: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)

    def called(self, what: str) -> None:
        """Record a blocking call if it was made by the loop's thread."""
        if threading.get_ident() == self.thread:
            self.waits.append(what)


_watches: list[LoopWatch] = []


@functools.cache
def _listen() -> None:
    """Install the audit hook. Only one is ever added, because audit hooks cannot be removed."""

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if _watches and event in _WAITING and not str(arguments[0]).endswith(_OF_PYTHON):
            for watch in _watches:
                watch.called(f"{event} {arguments[0]}")

    sys.addaudithook(hear)


@contextmanager
def watched_loop() -> Iterator[LoopWatch]:
    """Watch the current thread's event loop while the context is active."""
    _listen()
    watch, run, sleep, fsync = LoopWatch(), asyncio.Handle._run, time.sleep, os.fsync

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        took_s = time.thread_time() - began
        if took_s > _MAX_CPU_S and took_s > max_cpu_s():  # measured before repr(handle), which is slow itself
            watch.slow.append(f"{took_s:.3f} s: {handle!r}")

    def slept(seconds: float) -> None:
        watch.called(f"time.sleep {seconds}")
        sleep(seconds)

    def synced(file: int) -> None:
        watch.called("os.fsync")
        fsync(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.Handle, "_run", timed)
        patch.setattr(time, "sleep", slept)
        patch.setattr(os, "fsync", synced)
        _watches.append(watch)
        try:
            yield watch
        finally:
            _watches.remove(watch)


@contextmanager
def blocked_default_executor() -> Iterator[None]:
    """Occupy every thread of the running loop's default executor while the context is active."""
    threads, free = ThreadPoolExecutor(max_workers=1), threading.Event()
    asyncio.get_running_loop().set_default_executor(threads)
    threads.submit(free.wait)
    try:
        yield
    finally:
        free.set()
