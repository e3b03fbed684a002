"""Answers a query about a Ray cluster in a separate process, which is connected to Ray; see cluster.py.

The cluster's address is passed as the argument, the query is read from standard input, and the answer is written to
standard output.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from serving.engines.ray.autoscaler import adds_machines, requested
from serving.engines.ray.cluster import (
    ASK_TIMEOUT_S,
    QUESTION,
    Answer,
    Capacity,
    Describe,
    Described,
    End,
    Grow,
    Place,
    Placed,
    Question,
    Resources,
)
from serving.engines.ray.messages import Problem
from serving.engines.ray.need import Need
from svc.engine.device import DeviceCapabilities
from svc.errors import EngineError, SvcError
from svc.ray_cluster import connected

_AUTH_TIMEOUT_S = 5.0
_END_TIMEOUT_S = 5.0
_UNAUTHENTICATED = "UNAUTHENTICATED"
_NODES_METHOD = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"


def _answer(address: str, question: Question) -> Answer:
    with _connected(address):
        match question:
            case Describe():
                return Answer(described=_describe(question))
            case Capacity():
                return Answer(resources=Resources(free=_free(), grows=adds_machines()))
            case Grow():
                with requested(question.needs, question.wait_s) as has_room:
                    return Answer(has_room=has_room)
            case Place():
                return Answer(placed=_place(question))
            case End():
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
        EngineError: the head accepts the request, so anyone who can reach the head can run code on the cluster.
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
    for need in question.needs:
        if described := _described(need, question.folder):
            return described
    grows = adds_machines()
    if grows:
        for need in question.needs:
            with requested((need,), question.wait_s) as has_room:
                if has_room and (described := _described(need, question.folder)):
                    return described
    nodes = _alive()
    sizes = "; ".join(str({k: v for k, v in node["Resources"].items() if "node:" not in k}) for node in nodes)
    raise EngineError(
        f"no machine in the Ray cluster has {' or '.join(map(str, question.needs))}"
        + (f", and it did not add one within {question.wait_s:g} s" if grows else ""),
        expected=f"a machine with these resources; the cluster has {sizes}",
        todo="change ray.gpu_type, ray.cpus or engine.tensor_parallel, or add a machine; an engine's GPUs must be in "
        "one machine" + ("; or raise ray.wait_s" if grows else ""),
    )


def _described(need: Need, folder: str) -> Described | None:
    """Return the capabilities of the first machine with these resources, or None if there is none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from serving.engines.ray.node_capabilities import node_capabilities

    for node in _alive():
        if need.fits(node["Resources"]):
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(node_capabilities).options(num_cpus=0, scheduling_strategy=here)
            found = ray.get(task.remote(folder), timeout=ASK_TIMEOUT_S)
            return Described(need=need, capabilities=DeviceCapabilities.model_validate_json(found))
    return None


def _free() -> tuple[dict[str, float], ...]:
    from ray._private.state import available_resources_per_node

    return tuple(available_resources_per_node().values())


def _place(question: Place) -> Placed:
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    from serving.engines.ray.actor import EngineActor

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
            f"no machine in the Ray cluster had {question.need.resources} free within {question.timeout_s:.0f} s",
            todo="free up resources, add a machine, or raise ray.wait_s: `ray status` shows what is in use",
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
        answer = _answer(sys.argv[1], QUESTION.validate_json(sys.stdin.buffer.read()))
    except SvcError as error:
        answer = Answer(problem=Problem(wrong=error.wrong, expected=error.expected, todo=error.todo))
    os.write(answer_to, answer.model_dump_json().encode())


if __name__ == "__main__":
    _main()
