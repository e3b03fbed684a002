"""Queries about a Ray cluster, which run in a separate process that is connected to Ray; see cluster.py.

The cluster's address is the process's argument. It reads a query from standard input, a function without arguments, and
writes the result to standard output, or the `EngineError` that was raised. Both are pickled.
"""

import logging
import os
import pickle
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from serving.engines.ray.autoscaler import adds_machines, requested
from serving.engines.ray.link import Placed
from svc.engine.device import DeviceCapabilities
from svc.errors import EngineError, SvcError
from svc.ray.cluster import connected
from svc.ray.need import Need

TIMEOUT_S = 120.0
"""Maximum time for a query, in seconds, in addition to its wait for resources."""
_AUTH_TIMEOUT_S = 5.0
_END_TIMEOUT_S = 5.0
_UNAUTHENTICATED = "UNAUTHENTICATED"
_NODES_METHOD = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"


@dataclass(frozen=True, slots=True)
class Described:
    """The first resource requirement that some machine in the cluster satisfies, and that machine's capabilities."""

    need: Need
    capabilities: DeviceCapabilities


@dataclass(frozen=True, slots=True)
class Resources:
    """Free resources of a cluster.

    Attributes:
        free: free resources of each machine.
        grows: whether the cluster adds machines on demand.
    """

    free: tuple[dict[str, float], ...]
    grows: bool


def _require_token() -> None:
    """Check that the cluster's head rejects a request without a token.

    Raises:
        EngineError: the head accepts the request, so anyone who can reach the head can run code on the cluster.
    """
    import grpc  # type: ignore[import-untyped]
    import ray

    head = ray.get_runtime_context().gcs_address
    with grpc.insecure_channel(head) as channel:
        try:
            channel.unary_unary(_NODES_METHOD)(b"", timeout=_AUTH_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code().name != _UNAUTHENTICATED and "token" not in str(error.details()).lower():
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


def describe(needs: Sequence[Need], folder: str, wait_s: float) -> Described:
    """Return the capabilities of a machine that has the needed resources, even if they are in use.

    Args:
        needs: alternative resource requirements, in order of preference.
        wait_s: if the cluster has no such machine, the maximum wait for it to add one, in seconds per alternative.
    """
    for need in needs:
        if described := _described(need, folder):
            return described
    grows = adds_machines()
    if grows:
        for need in needs:
            with requested((need,), wait_s) as has_room:
                if has_room and (described := _described(need, folder)):
                    return described
    nodes = _alive()
    sizes = "; ".join(str({k: v for k, v in node["Resources"].items() if "node:" not in k}) for node in nodes)
    raise EngineError(
        f"no machine in the Ray cluster has {' or '.join(map(str, needs))}"
        + (f", and it did not add one within {wait_s:g} s" if grows else ""),
        expected=f"a machine with these resources; the cluster has {sizes}",
        todo="change ray.gpu_type, ray.cpus or engine.tensor_parallel, or add a machine; an engine's GPUs must be in "
        "one machine" + ("; or raise ray.wait_s" if grows else ""),
    )


def _described(need: Need, folder: str) -> Described | None:
    """Return the capabilities of the first machine with these resources, or None if there is none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from serving.engines.ray.actor import machine_capabilities

    for node in _alive():
        if need.count_in(node["Resources"]):
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(machine_capabilities).options(num_cpus=0, scheduling_strategy=here)
            return Described(need, ray.get(task.remote(folder), timeout=TIMEOUT_S))
    return None


def resources() -> Resources:
    """Return each machine's free resources, and whether the cluster adds machines on demand."""
    from ray._private.state import available_resources_per_node

    return Resources(tuple(available_resources_per_node().values()), adds_machines())


def grow(needs: Sequence[Need], wait_s: float) -> bool:
    """Request resources for engines, so that the cluster adds machines if needed. Return whether all the engines fit.

    Args:
        wait_s: maximum wait for enough free resources, in seconds.
    """
    with requested(needs, wait_s) as has_room:
        return has_room


def place(name: str, need: Need, folder: str, peer: str, timeout_s: float) -> Placed:
    """Create a Ray actor that runs an engine."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    from serving.engines.ray.actor import EngineActor

    others = {resource: amount for resource, amount in need.resources.items() if resource not in ("CPU", "GPU")}
    amounts = {"num_cpus": need.cpus, "num_gpus": need.gpus, "resources": others}
    remote: Any = ray.remote(EngineActor).options(name=name, lifetime="detached", max_restarts=0, **amounts)
    actor = remote.remote(name, folder, peer)
    try:
        placed: Placed = ray.get(actor.listening.remote(), timeout=timeout_s)
    except GetTimeoutError:
        ray.kill(actor)
        raise EngineError(
            f"no machine in the Ray cluster had {need} free within {timeout_s:.0f} s",
            todo="free up resources, add a machine, or raise ray.wait_s: `ray status` shows what is in use",
        ) from None
    except RayActorError as error:
        raise EngineError(f"actor {name} could not start: {error}") from error
    return placed


def end(*names: str) -> None:
    """Stop Ray actors, if they exist."""
    import ray
    from ray.exceptions import RayError

    for name in names:
        try:
            actor = ray.get_actor(name)
        except ValueError:
            continue
        ray.kill(actor)
        with suppress(RayError):  # it is dead, or its machine is
            ray.get(actor.listening.remote(), timeout=_END_TIMEOUT_S)


def _main() -> None:
    # Ray and what it imports write to standard output.
    answer_to = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    query = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started this one
    os.environ["RAY_AUTH_MODE"] = "token"
    try:
        with connected(sys.argv[1]):
            _require_token()
            answer = query()
    except SvcError as error:
        answer = EngineError(error.wrong, expected=error.expected, todo=error.todo)
    with open(answer_to, "wb") as file:
        pickle.dump(answer, file)


if __name__ == "__main__":
    _main()
