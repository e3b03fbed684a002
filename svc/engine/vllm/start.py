"""Starts a vLLM server faster, by letting its two processes import vLLM at the same time.

    python -m svc.engine.vllm.start ENTRY_MODULE ARGUMENTS

vLLM's HTTP process starts the engine core as a new Python process, which imports vLLM again. On two cores, this second
import takes 9 of the 24 seconds of engine startup. Here, a fork server imports vLLM at the same time as the HTTP
process, and the core is forked from that server, which reduces the startup time to 15 seconds. Unlike the HTTP process,
the fork server has no threads and has not computed anything, so forking it is safe. The fork server is used only on a
CPU, because CUDA cannot be used in a process that was forked after its parent used CUDA. This module imports only the
standard library, so that the fork server starts immediately.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from multiprocessing import context, forkserver
from typing import Any

_CORE = ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "transformers")
"""Modules that the core imports but the HTTP process does not. Modules missing from the installed vLLM are skipped."""


class _Process(context.ForkServerProcess):
    """A forked process that uses its creator's environment instead of the fork server's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._environment = dict(os.environ)

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class ForkingContext(context.ForkServerContext):
    """A multiprocessing context that replaces "spawn" and forks processes from the fork server instead."""

    _name = "spawn"
    Process = _Process


def start(entry: str, preloaded: Sequence[str] = _CORE) -> None:
    """Run a module as the main program, forking its child processes from a server that has already imported `entry`
    and `preloaded`.

    Args:
        entry: the module to run and to import in the fork server. Its arguments are `sys.argv[1:]`.
        preloaded: other modules to import in the fork server.
    """
    multiprocessing.set_forkserver_preload([entry, *preloaded])
    forkserver.ensure_running()
    vars(context)["_concrete_contexts"]["spawn"] = ForkingContext()  # typeshed does not have it
    runpy.run_module(entry, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # From the importable module: the started process looks `_Process` up there.
    from svc.engine.vllm.start import start as start_importable

    start_importable(sys.argv.pop(1))
