"""Starts vLLM's server so that its two processes import vLLM at the same time.

    python -m svc.engine.vllm.start ENTRY_MODULE ARGUMENTS

vLLM's HTTP process starts the engine core as a new Python process, which imports vLLM again. This takes
9 of the 24 seconds of a start on two cores. Here a fork server imports vLLM while the HTTP process does,
and the core is forked from the fork server, so that a start takes 15 seconds. Unlike the HTTP process, a
fork server has no threads and has computed nothing, so forking it is safe. This is done only on a CPU,
because a process forked after CUDA was used cannot use CUDA. Only the standard library is imported here,
so that the fork server starts at once.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from multiprocessing import context, forkserver
from typing import Any

_CORE = ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "transformers")
"""Modules that only the core imports, not the HTTP process. Any that the installed vLLM lacks are skipped."""


class _Process(context.ForkServerProcess):
    """A process that gets its creator's environment instead of the fork server's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._environment = dict(os.environ)

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class _Context(context.ForkServerContext):
    """Forks a process from the fork server where a spawned one is requested."""

    _name = "spawn"
    Process = _Process


def start(entry: str, preloaded: Sequence[str] = _CORE) -> None:
    """Run a module as the main program, with processes that have already imported it and other modules.

    Args:
        entry: the module to run; its arguments are `sys.argv[1:]`.
        preloaded: the other modules to import.
    """
    multiprocessing.set_forkserver_preload([entry, *preloaded])
    forkserver.ensure_running()
    vars(context)["_concrete_contexts"]["spawn"] = _Context()  # typeshed does not have it
    runpy.run_module(entry, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # From the importable module: the started process looks `_Process` up there.
    from svc.engine.vllm.start import start as start_importable

    start_importable(sys.argv.pop(1))
