"""A run that is asked to end: the notice of a spot machine, an administrator's kill, Ctrl-C.

The first signal gives up the step that is under way, whose end may be minutes off, or is noted until what must not be
cut in two has ended; the second ends the process as it would without us.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from svc.terminal import console

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StepAbandoned(KeyboardInterrupt):
    """A step was given up; nothing that it began has changed what the run goes on from. No error, as its base."""


class Preemption:
    """Whether a signal came, and which."""

    def __init__(self) -> None:
        self.by: signal.Signals | None = None
        self._interruptible = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around work that may be given up at any moment.

        Raises:
            StepAbandoned: a signal comes meanwhile, or came before.
        """
        self._interruptible = True
        try:
            self._look()
            yield
        finally:
            self._interruptible = False

    def receive(self, by: signal.Signals) -> None:
        """A signal came."""
        self.by = by
        self._look()

    def _look(self) -> None:
        if self.by is not None and self._interruptible:
            raise StepAbandoned(self.by.name)


@contextmanager
def preemption() -> Iterator[Preemption]:
    """Inside, the first SIGTERM or Ctrl-C comes to this; outside the main thread, which gets none, nothing does."""
    found = Preemption()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        # Who reads the log may have heard the same signal: rich ends the process where it cannot write.
        with suppress(OSError, RuntimeError, SystemExit):
            console.print(f"  {signal.Signals(number).name}: giving up this step; once more to end at once")
        found.receive(signal.Signals(number))

    for number in _SIGNALS:
        signal.signal(number, note)
    try:
        yield found
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
