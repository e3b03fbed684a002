"""Starts a vLLM server faster, by importing vLLM once for its two processes.

    python -m svc.engine.vllm.start ENTRY_MODULE ARGUMENTS

vLLM's HTTP process starts the engine core as a new Python process, which imports vLLM again and thus needs 8 more
seconds of processor time. Here, the process that becomes the HTTP server imports vLLM and then forks a copy of itself,
a fork server, from which the core is forked later. Unlike the HTTP process, the fork server has no Python threads and
has not computed anything, so forking it is safe. The fork server is used only on a CPU, because CUDA cannot be used in
a process that was forked after its parent used CUDA.

The garbage collector is off during these imports.

With a tiny model on an AMD EPYC, an engine is ready after 8 seconds instead of 20 with vLLM alone on two cores (9
instead of 22 on one), and needs 9 seconds of processor time instead of 20.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from multiprocessing import context, forkserver, resource_tracker, util
from typing import Any

from svc.imports import without_garbage_collection

_CORE = ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "transformers")
"""Modules that the core imports but the HTTP process does not. Modules missing from the installed vLLM are skipped."""

_new_process = util.spawnv_passfds


class _Process(context.ForkServerProcess):
    """A forked process that uses its creator's environment instead of the fork server's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._environment = dict(os.environ)

    def run(self) -> None:
        gc.freeze()
        gc.enable()  # see `_fork`
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
        entry: the module to run and to import. Its arguments are `sys.argv[1:]`.
        preloaded: other modules to import in the fork server, while the entry module runs.
    """
    with without_garbage_collection():
        importlib.import_module(entry)
    inspect_models_in_this_process()
    multiprocessing.set_forkserver_preload(list(preloaded))
    resource_tracker.ensure_running()  # before the replacement, which would fork this process for it too
    vars(util)["spawnv_passfds"] = _fork
    forkserver.ensure_running()
    vars(util)["spawnv_passfds"] = _new_process
    vars(context)["_concrete_contexts"]["spawn"] = ForkingContext()  # typeshed does not have it
    runpy.run_module(entry, run_name="__main__", alter_sys=True)


def inspect_models_in_this_process() -> None:
    """Let vLLM, if this process has imported it, load a model's class here to find out what the model supports.

    vLLM does so in a new process, because loading a class may initialize CUDA. That process imports vLLM again, which
    takes 11 seconds of processor time; here, loading the class takes 0.7.
    """
    if registry := sys.modules.get("vllm.model_executor.models.registry"):
        vars(registry)["_run_in_subprocess"] = lambda inspect: inspect()


def _fork(path: bytes, arguments: Sequence[str], inherited: Sequence[int]) -> int:
    """Run `python -c CODE` in a fork of this process instead of a new process, and return the id of the fork.

    Args:
        arguments: command line of Python, which ends with CODE.
        inherited: file descriptors to leave open, in addition to the standard streams.
    """
    if pid := os.fork():
        return pid
    gc.disable()  # the fork server only imports
    vars(util)["spawnv_passfds"] = _new_process
    for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *inherited}:
        with contextlib.suppress(OSError):  # `listdir` has closed its own
            os.close(descriptor)
    try:
        exec(arguments[-1])  # noqa: S102 - from the standard library, and not the same in all releases of Python
    except SystemExit:
        os._exit(0)  # so that the rest of `start` does not run here too
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    # From the importable module: the started process looks `_Process` up there.
    from svc.engine.vllm.start import start as start_importable

    start_importable(sys.argv.pop(1))
