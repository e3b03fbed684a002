"""A run that is asked to end: the notice of a spot machine, an administrator's kill, Ctrl-C.

The first signal is remembered until the step has ended; the second ends the process as it would without us.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from svc.terminal import console

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Whether a signal came, and which."""

    def __init__(self) -> None:
        self.by: signal.Signals | None = None


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Inside, the first SIGTERM or Ctrl-C is noted only; outside the main thread, which gets no signals, nothing is."""
    found = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        found.by = signal.Signals(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        console.print(f"  {found.by.name}: a checkpoint is written after this step; once more to end at once")

    for number in _SIGNALS:
        signal.signal(number, note)
    try:
        yield found
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
