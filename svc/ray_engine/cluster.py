"""Creates and stops actors in a Ray cluster, and asks the cluster which machines have enough resources for an engine.

Each query runs in a short-lived process, `python -m svc.ray_engine.cluster`, because a connection to Ray adds threads
and signal handlers and costs 100 MB. It also terminates its process when the cluster's head is unreachable for a
minute. Requests to a running engine do not go through Ray.
"""

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from svc.engine.device import DeviceCapabilities
from svc.errors import EngineError, SvcError
from svc.ray_cluster import connected
from svc.ray_engine.messages import Problem

_ASK_S = 120.0
_AUTH_TIMEOUT_S = 5.0
_END_TIMEOUT_S = 5.0
_UNAUTHENTICATED = "UNAUTHENTICATED"
_ROUNDING = 1e-9
_NODES_METHOD = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Need(_Model):
    """Resources of one engine, keyed by Ray's names, which include `GPU` and `CPU`."""

    resources: dict[str, float]

    def __hash__(self) -> int:
        return hash(frozenset(self.resources.items()))

    def fits(self, has: Mapping[str, float]) -> bool:
        """Return whether an engine fits on a machine with these resources."""
        return all(has.get(name, 0.0) >= amount - _ROUNDING for name, amount in self.resources.items())

    def __str__(self) -> str:
        return " and ".join(f"{amount:g} {name}" for name, amount in self.resources.items())


def count_fitting(needs: Sequence[Need], free: Sequence[Mapping[str, float]]) -> int:
    """Return how many engines fit on a cluster's machines together.

    The largest engines are placed first, each on the machine with the least left for others. This finds a place for
    all if their sizes divide each other, as 1, 2, 4 and 8 GPUs do.

    Args:
        free: free resources of each machine.
    """
    left = [dict(machine) for machine in free]
    fitting = 0
    for need in sorted(needs, key=lambda need: max(need.resources.values()), reverse=True):
        machines = [machine for machine in left if need.fits(machine)]
        if machines:
            machine = min(machines, key=lambda machine: [machine[name] for name in need.resources])
            for name, amount in need.resources.items():
                machine[name] -= amount
            fitting += 1
    return fitting


class Describe(_Model):
    """Return the capabilities of a machine that has the resources, even if they are in use."""

    do: Literal["describe"] = "describe"
    needs: tuple[Need, ...]
    folder: str


class Free(_Model):
    """Return the free resources of each machine."""

    do: Literal["free"] = "free"


class Place(_Model):
    """Create an actor."""

    do: Literal["place"] = "place"
    name: str
    need: Need
    folder: str
    peer: str
    timeout_s: float


class End(_Model):
    """End actors, if they exist."""

    do: Literal["end"] = "end"
    names: tuple[str, ...]


class Placed(_Model):
    """An actor's address and port for commands, and its certificate as PEM text."""

    host: str
    port: int
    certificate: str


class Described(_Model):
    """The first of the requested needs that a machine in the cluster can meet, and the machine's capabilities."""

    need: Need
    capabilities: DeviceCapabilities


class Answer(_Model):
    """The answer to a query: one of the attributes is set, or none for `end`."""

    placed: Placed | None = None
    described: Described | None = None
    free: tuple[dict[str, float], ...] | None = None
    problem: Problem | None = None


Question = Describe | Free | Place | End
_QUESTION: TypeAdapter[Question] = TypeAdapter(Annotated[Question, Field(discriminator="do")])


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster.

    Args:
        address: see `RaySettings.address`.
    """

    address: str

    def describe(self, needs: tuple[Need, ...], folder: str) -> Described:
        """Return the capabilities of the machines for engines. This blocks for seconds, and imports torch on such a
        machine.

        Raises:
            EngineError: the cluster cannot be reached, has no such machine, or accepts requests without a token.
        """
        answer = self._ask(Describe(needs=needs, folder=folder)).described
        assert answer is not None  # noqa: S101 - the answer to this question
        return answer

    def free(self) -> tuple[dict[str, float], ...]:
        """Return the free resources of each machine. This blocks for seconds."""
        return self._ask(Free()).free or ()

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
        """Stop actors, if they exist. This blocks for seconds and raises the same errors as `end`."""
        self._ask(End(names=names))

    async def _asked(self, question: Question) -> Answer:
        process = self._begin()
        try:
            return await asyncio.to_thread(self._finish, process, question)
        finally:
            if process.poll() is None:  # cancelled
                process.kill()

    def _ask(self, question: Question) -> Answer:
        return self._finish(self._begin(), question)

    def _begin(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "svc.ray_engine.cluster", self.address]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, process_group=0)

    def _finish(self, process: "subprocess.Popen[bytes]", question: Question) -> Answer:
        errors = b""
        timeout_s = _ASK_S + (question.timeout_s if isinstance(question, Place) else 0)
        try:
            out, errors = process.communicate(question.model_dump_json().encode(), timeout=timeout_s)
            answer = Answer.model_validate_json(out)
        except (subprocess.TimeoutExpired, ValidationError) as error:
            process.kill()
            process.wait()
            last = errors.decode(errors="replace").strip().splitlines() or [type(error).__name__]
            raise EngineError(
                f"the Ray cluster {self.address} did not answer: {last[-1][-300:]}",
                todo="check ray.address and that the cluster runs: ray status",
            ) from error
        if answer.problem is not None:
            raise answer.problem.error()
        return answer


def _answer(address: str, question: Question) -> Answer:
    match question:
        case Describe():
            with _connected(address):
                return Answer(described=_describe(question))
        case Free():
            with _connected(address):
                return Answer(free=_free())
        case Place():
            with _connected(address):
                return Answer(placed=_place(question))
        case End():
            with _connected(address):
                for name in question.names:
                    _end(name)
                return Answer()


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Connect this process to a cluster that requires a token, for the duration of the `with` block."""
    os.environ["RAY_AUTH_MODE"] = "token"
    with connected(address):
        import ray

        _require_token(ray.get_runtime_context().gcs_address)
        yield


def _require_token(head: str) -> None:
    """Check that the cluster's head rejects a request without a token.

    Raises:
        EngineError: the head accepts it, so anyone who can reach it can run code on the cluster.
    """
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(head) as channel:
        try:
            channel.unary_unary(_NODES_METHOD)(b"", timeout=_AUTH_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code().name == _UNAUTHENTICATED or "token" in str(error.details()).lower():
                return
            logging.getLogger(__name__).info("the cluster's head refuses unencrypted requests: %s", error.code())
            return
    raise EngineError(
        f"the Ray cluster at {head} accepts requests without a token, so anyone who can reach it can run code on its "
        "machines",
        expected="token authentication, which is Ray's default",
        todo="restart the cluster with RAY_AUTH_MODE=token: docs.ray.io/en/latest/ray-security/token-auth.html",
    )


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _describe(question: Describe) -> Described:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from svc.ray_engine.node_capabilities import node_capabilities

    nodes = _alive()
    for need in question.needs:
        for node in nodes:
            if need.fits(node["Resources"]):
                here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = ray.remote(node_capabilities).options(num_cpus=0, scheduling_strategy=here)
                found = ray.get(task.remote(question.folder), timeout=_ASK_S)
                return Described(need=need, capabilities=DeviceCapabilities.model_validate_json(found))
    sizes = "; ".join(str({k: v for k, v in node["Resources"].items() if "node:" not in k}) for node in nodes)
    raise EngineError(
        f"no machine in the Ray cluster has {' or '.join(str(need.resources) for need in question.needs)}",
        expected=f"a machine with these resources; the cluster has {sizes}",
        todo="change ray.gpu_type, ray.cpus or engine.tensor_parallel, or add a machine; an engine's GPUs must be in "
        "one machine",
    )


def _free() -> tuple[dict[str, float], ...]:
    from ray._private.state import available_resources_per_node

    return tuple(available_resources_per_node().values())


def _place(question: Place) -> Placed:
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    from svc.ray_engine.actor import EngineActor

    others = {name: amount for name, amount in question.need.resources.items() if name not in ("CPU", "GPU")}
    options = {
        "name": question.name,
        "lifetime": "detached",
        "max_restarts": 0,
        "num_cpus": question.need.resources.get("CPU", 0),
        "num_gpus": question.need.resources.get("GPU", 0),
        "resources": others,
    }
    remote: Any = ray.remote(EngineActor)
    actor = remote.options(**options).remote(question.name, question.folder, question.peer)
    try:
        host, port, certificate = ray.get(actor.listening.remote(), timeout=question.timeout_s)
    except GetTimeoutError:
        ray.kill(actor)
        raise EngineError(
            f"no machine in the Ray cluster had {question.need.resources} free for {question.timeout_s:.0f} s",
            todo="free resources, add a machine, or raise ray.wait_s: `ray status` shows what is in use",
        ) from None
    except RayActorError as error:
        raise EngineError(f"actor {question.name} could not start: {error}") from error
    return Placed(host=host, port=port, certificate=certificate)


def _end(name: str) -> None:
    import ray
    from ray.exceptions import RayError

    try:
        actor = ray.get_actor(name)
    except ValueError:
        return
    ray.kill(actor)
    try:
        ray.get(actor.listening.remote(), timeout=_END_TIMEOUT_S)
    except RayError:  # it is dead, or its machine is
        return


def _main() -> None:
    # Ray and what it imports write to standard output.
    answer_to = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        answer = _answer(sys.argv[1], _QUESTION.validate_json(sys.stdin.buffer.read()))
    except SvcError as error:
        answer = Answer(problem=Problem(wrong=error.wrong, expected=error.expected, todo=error.todo))
    os.write(answer_to, answer.model_dump_json().encode())


if __name__ == "__main__":
    _main()
