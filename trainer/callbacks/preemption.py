"""Handles signals that stop a run, such as the termination notice of a spot instance, an administrator's `kill`, or
Ctrl-C.

At the first signal, the current step is abandoned, because it may take minutes to finish. If the signal arrives during
work that must not be interrupted, it is recorded and takes effect when that work has finished. A second signal has its
default effect, which ends the process.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

from svc.terminal import console

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
Value = TypeVar("Value")


class StepAbandoned(KeyboardInterrupt):
    """Raised to abandon a training step before it changes the state from which the run resumes.

    Like `KeyboardInterrupt`, this is not an `Exception`, so that error handlers do not catch it.
    """


class Preemption:
    """Records the stop signal that a run has received, if any."""

    def __init__(self) -> None:
        self.by: signal.Signals | None = None
        self._interruptible = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Allow signals to interrupt the `with` block at any moment.

        Raises:
            StepAbandoned: a signal arrives during the block, or arrived before it.
        """
        self._interruptible = True
        try:
            self._check()
            yield
        finally:
            self._interruptible = False

    def agreed(self, value: Value) -> Value:
        """Return the value on which all processes of the training run agree. A single process keeps its own value."""
        return value

    def receive(self, by: signal.Signals) -> None:
        """Record a signal, and raise StepAbandoned if the current work is interruptible."""
        self.by = by
        self._check()

    def _check(self) -> None:
        if self.by is not None and self._interruptible:
            raise StepAbandoned(self.by.name)


@contextmanager
def preemption() -> Iterator[Preemption]:
    """Yield an object that receives the first SIGTERM or Ctrl-C during the `with` block. Only the main thread
    receives signals.
    """
    received = Preemption()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        # The reader of the log may have received the same signal, and rich exits the process if it cannot write.
        with suppress(OSError, RuntimeError, SystemExit):
            console.print(
                f"  {signal.Signals(number).name} received: abandoning this step; repeat the signal to stop immediately"
            )
        received.receive(signal.Signals(number))

    for number in _SIGNALS:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
