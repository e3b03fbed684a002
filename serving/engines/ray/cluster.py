"""Creates and stops actors in a Ray cluster, and asks the cluster which machines have enough resources for an engine.

Each query runs in a short-lived process (cluster_query.py), because a connection to Ray adds threads and signal
handlers and takes 100 MB of memory. Ray also terminates a connected process when the cluster's head is unreachable for
a minute. Requests to a running engine do not go through Ray.
"""

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from serving.engines.ray.messages import Problem
from serving.engines.ray.need import Need
from svc.engine.device import DeviceCapabilities
from svc.errors import EngineError

ASK_TIMEOUT_S = 120.0


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Describe(_Model):
    """Query for the capabilities of a machine that has the needed resources, even if they are in use.

    Attributes:
        needs: alternative resource requirements, in order of preference.
        wait_s: if the cluster has no such machine, the maximum wait for it to add one, in seconds per alternative.
    """

    do: Literal["describe"] = "describe"
    needs: tuple[Need, ...]
    folder: str
    wait_s: float


class Capacity(_Model):
    """Query that asks for each machine's free resources, and asks whether the cluster adds machines on demand."""

    do: Literal["capacity"] = "capacity"


class Grow(_Model):
    """Query that requests resources for engines, so that the cluster adds machines if needed.

    The answer states whether all the engines fit.

    Attributes:
        wait_s: maximum wait for enough free resources, in seconds.
    """

    do: Literal["grow"] = "grow"
    needs: tuple[Need, ...]
    wait_s: float


class Place(_Model):
    """Request to create a Ray actor that runs an engine."""

    do: Literal["place"] = "place"
    name: str
    need: Need
    folder: str
    peer: str
    timeout_s: float


class End(_Model):
    """Request to stop Ray actors, if they exist."""

    do: Literal["end"] = "end"
    names: tuple[str, ...]


class Placed(_Model):
    """An actor's address and port for commands, and its certificate in PEM format."""

    host: str
    port: int
    certificate: str


class Described(_Model):
    """The first resource requirement that some machine in the cluster satisfies, and that machine's capabilities."""

    need: Need
    capabilities: DeviceCapabilities


class Resources(_Model):
    """Free resources of a cluster.

    Attributes:
        free: free resources of each machine.
        grows: whether the cluster adds machines on demand.
    """

    free: tuple[dict[str, float], ...]
    grows: bool


class Answer(_Model):
    """The answer to a query. Exactly one attribute is set, or none after a successful `end`."""

    placed: Placed | None = None
    described: Described | None = None
    resources: Resources | None = None
    has_room: bool | None = None
    problem: Problem | None = None


Question = Describe | Capacity | Grow | Place | End
QUESTION: TypeAdapter[Question] = TypeAdapter(Annotated[Question, Field(discriminator="do")])


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster.

    Args:
        address: see `RaySettings.address`.
    """

    address: str

    def describe(self, needs: tuple[Need, ...], folder: str, wait_s: float) -> Described:
        """Return the capabilities of the machines that have the resources for an engine. This call imports torch on
        such a machine, and takes several seconds. If there is no such machine, and the cluster adds machines on demand,
        the call blocks until a machine is added.

        Args:
            wait_s: maximum wait for a machine, in seconds, for each of the alternatives in `needs`.

        Raises:
            EngineError: the cluster cannot be reached, has no such machine, or accepts requests without a token.
        """
        answer = self._ask(Describe(needs=needs, folder=folder, wait_s=wait_s)).described
        assert answer is not None  # noqa: S101 - the answer to this question
        return answer

    async def resources(self) -> Resources:
        """Return the free resources. This takes several seconds.

        Raises:
            EngineError: the cluster cannot be reached.
        """
        answer = (await self._asked(Capacity())).resources
        assert answer is not None  # noqa: S101 - the answer to this question
        return answer

    async def grow(self, needs: Sequence[Need], wait_s: float) -> bool:
        """Request resources for engines, so that the cluster adds machines if needed.

        Return whether all the engines fit.

        Args:
            needs: resources of each engine.
            wait_s: maximum wait for enough free resources, in seconds.

        Raises:
            EngineError: the cluster cannot be reached.
        """
        return bool((await self._asked(Grow(needs=tuple(needs), wait_s=wait_s))).has_room)

    async def place(self, question: Place) -> Placed:
        """Create an actor, and wait until it runs.

        Raises:
            EngineError: no machine had the resources in time, or the actor could not start.
        """
        answer = (await self._asked(question)).placed
        assert answer is not None  # noqa: S101 - the answer to this question
        return answer

    async def end(self, name: str) -> None:
        """Stop an actor, if it exists.

        Raises:
            EngineError: the cluster cannot be reached.
        """
        await self._asked(End(names=(name,)))

    def end_now(self, *names: str) -> None:
        """Stop actors, if they exist. This blocks for several seconds and raises the same errors as `end`."""
        self._ask(End(names=names))

    async def _asked(self, question: Question) -> Answer:
        process = self._begin()
        try:
            return await asyncio.to_thread(self._finish, process, question)
        finally:
            if process.poll() is None:  # cancelled
                process.kill()

    def _ask(self, question: Question) -> Answer:
        process = self._begin()
        try:
            return self._finish(process, question)
        finally:
            if process.poll() is None:  # interrupted
                process.kill()

    def _begin(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "serving.engines.ray.cluster_query", self.address]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, process_group=0)

    def _finish(self, process: "subprocess.Popen[bytes]", question: Question) -> Answer:
        errors = b""
        timeout_s = ASK_TIMEOUT_S + _wait_s(question)
        try:
            out, errors = process.communicate(question.model_dump_json().encode(), timeout=timeout_s)
            answer = Answer.model_validate_json(out)
        except (subprocess.TimeoutExpired, ValidationError) as error:
            process.kill()
            process.wait()
            last = errors.decode(errors="replace").strip().splitlines() or [type(error).__name__]
            raise EngineError(
                f"the Ray cluster {self.address} did not answer: {last[-1][-300:]}",
                todo="check ray.address, and check that the cluster is running: ray status",
            ) from error
        if answer.problem is not None:
            raise answer.problem.error()
        return answer


def _wait_s(question: Question) -> float:
    """Return how long a query may wait for resources, in seconds."""
    match question:
        case Place():
            return question.timeout_s
        case Grow():
            return question.wait_s
        case Describe():
            return question.wait_s * len(question.needs)
        case Capacity() | End():
            return 0.0
