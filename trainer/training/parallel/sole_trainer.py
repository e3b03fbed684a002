"""Prevents two commands, on any machines, from training the same run on one Ray cluster at the same time."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from svc.errors import BusyError

_ENDS_S = 15.0
"""Seconds to wait for Ray to stop the actor of a command that was killed."""


class RunHolder:
    """A named Ray actor that exists while a command trains a run, and thus keeps other commands from training it.

    Args:
        command: host name and process id of the command that trains the run.
    """

    def __init__(self, command: str) -> None:
        self._command = command

    def describe(self) -> str:
        """Return the host name and process id of the command that trains the run."""
        return self._command


@contextmanager
def sole_trainer(run: str) -> Iterator[None]:
    """Prevent other commands from training a run for the duration of the `with` block. This process must be connected
    to a cluster.

    Within a namespace, Ray allows only one actor with a given name. Ray stops the actor when the process that started
    the actor exits or is killed.

    Args:
        run: name of the run in the object store.

    Raises:
        BusyError: another command is already training the run.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name = f"training-{run}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    holder = ray.remote(RunHolder).options(name=name, num_cpus=0, scheduling_strategy=here)
    deadline = time.monotonic() + _ENDS_S
    while True:
        try:
            held = holder.remote(f"process {os.getpid()} on {socket.gethostname()}")
            break
        except ValueError as error:  # the name is taken
            if time.monotonic() > deadline:
                raise BusyError(
                    f"{_holder(name)} is already training {run} on this cluster",
                    expected="only one command per run at a time",
                    todo="wait until that process has ended, or stop it; the run's progress is kept",
                ) from error
            time.sleep(0.5)
    try:
        yield
    finally:
        ray.kill(held)


def _holder(name: str) -> str:
    """Return a description of the command whose actor has the given name."""
    import ray

    try:
        described: str = ray.get(ray.get_actor(name).describe.remote(), timeout=5)
    except (ValueError, ray.exceptions.RayError):
        return "another command"
    return described
