"""Creates and stops actors in a Ray cluster, and asks the cluster which machines have enough resources for an engine.

Each query runs in a short-lived process (cluster_query.py), because a connection to Ray adds threads and signal
handlers and takes 100 MB of memory. Ray also terminates a connected process when the cluster's head is unreachable for
a minute. Requests to a running engine do not go through Ray.
"""

import asyncio
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from serving.engines.ray import cluster_query
from serving.engines.ray.cluster_query import Described, Resources
from serving.engines.ray.link import Placed
from svc.errors import EngineError
from svc.ray.need import Need

Result = TypeVar("Result")


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster.

    Args:
        address: see `RaySettings.address`.
    """

    address: str

    def describe(self, needs: Sequence[Need], folder: str, wait_s: float) -> Described:
        """Return the capabilities of the machines that have the resources for an engine. This call imports torch on
        such a machine, and takes several seconds. If there is no such machine, and the cluster adds machines on demand,
        the call blocks until a machine is added.

        Args:
            wait_s: maximum wait for a machine, in seconds, for each of the alternatives in `needs`.

        Raises:
            EngineError: the cluster cannot be reached, has no such machine, or accepts requests without a token.
        """
        return self._ask(partial(cluster_query.describe, needs, folder, wait_s), wait_s * len(needs))

    async def resources(self) -> Resources:
        """Return the free resources. This takes several seconds.

        Raises:
            EngineError: the cluster cannot be reached.
        """
        return await self._asked(cluster_query.resources)

    async def grow(self, needs: Sequence[Need], wait_s: float) -> bool:
        """Request resources for engines, so that the cluster adds machines if needed.

        Return whether all the engines fit.

        Args:
            needs: resources of each engine.
            wait_s: maximum wait for enough free resources, in seconds.

        Raises:
            EngineError: the cluster cannot be reached.
        """
        return await self._asked(partial(cluster_query.grow, needs, wait_s), wait_s)

    async def place(self, name: str, need: Need, folder: str, peer: str, timeout_s: float) -> Placed:
        """Create an actor, and wait until it runs.

        Args:
            name, folder, peer: see `EngineActor`.
            timeout_s: maximum wait, in seconds, for the resources and for the actor to start.

        Raises:
            EngineError: no machine had the resources in time, or the actor could not start.
        """
        return await self._asked(partial(cluster_query.place, name, need, folder, peer, timeout_s), timeout_s)

    def end(self, *names: str) -> None:
        """Stop actors, if they exist. This blocks for several seconds.

        Raises:
            EngineError: the cluster cannot be reached.
        """
        self._ask(partial(cluster_query.end, *names))

    async def _asked(self, query: Callable[[], Result], wait_s: float = 0.0) -> Result:
        with self._process() as process:
            return await asyncio.to_thread(self._finish, process, query, wait_s)

    def _ask(self, query: Callable[[], Result], wait_s: float = 0.0) -> Result:
        with self._process() as process:
            return self._finish(process, query, wait_s)

    @contextmanager
    def _process(self) -> "Iterator[subprocess.Popen[bytes]]":
        """Start a process for a query, and kill it at the end of the `with` block if the query was cancelled."""
        command = [sys.executable, "-m", cluster_query.__name__, self.address]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, process_group=0)
        try:
            yield process
        finally:
            process.kill()

    def _finish(self, process: "subprocess.Popen[bytes]", query: Callable[[], Result], wait_s: float) -> Result:
        """Send a query to its process, and return the answer.

        Args:
            wait_s: how long the query may wait for resources, in seconds.
        """
        errors = b""
        try:
            out, errors = process.communicate(pickle.dumps(query), timeout=cluster_query.TIMEOUT_S + wait_s)
            answer: Result | EngineError = pickle.loads(out)  # noqa: S301 - from our own process
        except (subprocess.TimeoutExpired, EOFError, pickle.UnpicklingError) as error:
            process.kill()
            process.wait()
            last = errors.decode(errors="replace").strip().splitlines() or [type(error).__name__]
            raise EngineError(
                f"the Ray cluster {self.address} did not answer: {last[-1][-300:]}",
                todo="check ray.address, and check that the cluster is running: ray status",
            ) from error
        if isinstance(answer, EngineError):
            raise answer
        return answer
