"""Runs drift checks for the exporter in a separate process, because a check takes seconds of CPU time.

The process stays alive between checks, because importing its modules also takes seconds. It is restarted if it
dies, and it exits when its parent does.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context

from monitoring.drift.production import ProductionChecks
from svc.child_process import end_with_parent
from svc.settings.settings import Settings

log = logging.getLogger(__name__)

_NICENESS = 10
"""Niceness of the drift check process. At this value, all other processes have priority."""
_LOOK_EVERY_S = 1.0
_PAUSE_S = 10.0
"""Pause before the drift check process is restarted after it dies, in seconds."""

Prepare = Callable[[Settings], Callable[[], object]]


@contextmanager
def checking_drift(settings: Settings, prepare: Prepare = ProductionChecks) -> Iterator[None]:
    """Run drift checks in a separate process while the `with` body runs.

    On exit, the process is stopped, even in the middle of a check. The process is restarted if it dies. An
    interrupted check stores nothing, and the next check processes the same requests again.

    Args:
        prepare: function that is called once in the process and returns the check. The process then runs the
            check repeatedly, pausing for `monitor.drift_every_s` in between.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_supervise, args=(prepare, settings, stop), name="drift")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _supervise(prepare: Prepare, settings: Settings, stop: threading.Event) -> None:
    # Spawned, not forked: the exporter has threads.
    context = get_context("spawn")
    while not stop.is_set():
        process = context.Process(target=_work, args=(prepare, settings), daemon=True)
        process.start()
        while process.is_alive() and not stop.wait(_LOOK_EVERY_S):
            pass
        if stop.is_set():
            process.terminate()
            process.join()
            return
        log.error("the drift process exited with code %s; restarting it", process.exitcode)
        stop.wait(_PAUSE_S)


def _work(prepare: Prepare, settings: Settings) -> None:
    """Run drift checks on one CPU core until the parent process exits."""
    from threadpoolctl import threadpool_limits

    end_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.nice(_NICENESS)
    check = prepare(settings)
    with threadpool_limits(1):
        while True:
            try:
                check()
            except Exception:  # the boundary of this process: the next check may succeed
                log.exception("drift check failed")
            time.sleep(settings.monitor.drift_every_s)
