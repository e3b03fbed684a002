"""Work in a process of its own: for libraries whose threads, memory or patches would outlive the call.

It can be ended at any moment, which threads cannot: it ends with the caller that is interrupted, and where the caller's
process is killed. What it had in memory is free again. Knows nothing of what it runs.
"""

import gc
import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

from svc.errors import TrainingError
from svc.terminal import quiet_libraries

_CLEAN_UP_S = 5.0
"""For what a process that is done must remove by name, as semaphores: Python warns of each that is left."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_child_process(
    work: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
) -> Result:
    """Calls `work` in a new process and returns what it returns.

    Args:
        work: a function of a module; it, its arguments and its result are pickled.

    Raises:
        TrainingError: the process died, by the system's lack of memory for one.
        BaseException: whatever `work` raised, with its traceback as a note.
    """
    context = get_context("spawn")  # not forked: whoever calls has threads, of torch for one
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, work, arguments, named), name=work.__name__)
    process.start()
    sender.close()
    try:
        succeeded, outcome = receiver.recv()
        process.join(_CLEAN_UP_S)
    except EOFError:
        process.join()
        raise _died(work.__name__, process.exitcode) from None
    finally:
        # In the middle of its work, where the caller is interrupted; or it hangs in threads that a library left.
        process.kill()
        process.join()
        receiver.close()
    if not succeeded:
        raise outcome
    result: Result = outcome
    return result


def _work(sender: Connection, work: Callable[..., object], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    end_with_parent()
    quiet_libraries()
    try:
        outcome = True, work(*arguments, **named)
    except Exception as error:  # noqa: BLE001 - the boundary of this process: it is raised in the caller
        error.add_note(traceback.format_exc())
        outcome = False, error
    sender.send(outcome)
    sender.close()
    gc.freeze()  # or Python looks through all that is left when the process ends: 2 s after an import of torch


def end_with_parent() -> None:
    """Ends this process as soon as its parent is gone, whatever it does then; to be called first in a spawned one.

    Ctrl-C is the parent's to hear: a terminal sends it to both.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None  # noqa: S101 - multiprocessing knows the parent of each process that it made

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _died(name: str, exit_code: int | None) -> TrainingError:
    if exit_code == -signal.SIGKILL:
        todo = "free some memory: the system ends the largest process where it lacks it"
    else:
        todo = "see what it printed above"
    return TrainingError(f"{name.lstrip('_')}, in a process of its own, died with exit code {exit_code}", todo=todo)
