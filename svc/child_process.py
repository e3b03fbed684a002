"""Runs a function in a separate process, for libraries whose threads, memory or patches outlive a call.

Unlike a thread, the process can be stopped at any time, which releases its memory. It stops if the caller
is interrupted or the caller's process is killed.
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
"""Seconds that a process may take to clean up after its work is done. It must release named semaphores, for
example, because Python warns about each one left behind."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_child_process(
    work: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
) -> Result:
    """Call `work` in a new process and return its result.

    Args:
        work: module-level function. The function, its arguments and its result are pickled.

    Raises:
        TrainingError: the process died, for example because it ran out of memory.
        BaseException: the exception that `work` raised, with its original traceback as a note.
    """
    context = get_context("spawn")  # not forked: the caller has threads, for example torch's
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
        # The caller may be interrupted in the middle of the work, or the process hang in a library's threads.
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
    gc.freeze()  # else Python's last collection takes 2 s at exit after an import of torch


def end_with_parent() -> None:
    """Make this process stop as soon as its parent exits. Must be the first call in a spawned process.

    Ctrl-C is ignored in this process and handled by the parent, because a terminal sends it to both.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None  # noqa: S101 - multiprocessing knows the parent of each process that it created

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _died(name: str, exit_code: int | None) -> TrainingError:
    if exit_code == -signal.SIGKILL:
        todo = "free some memory: the system kills the largest process when memory runs out"
    else:
        todo = "check the process's output above"
    return TrainingError(f"the child process {name.lstrip('_')} exited with code {exit_code}", todo=todo)
