"""Stands in for Ray where a test needs real processes on several nodes, but no cluster, which takes 10 s to start.

An actor is a process of this machine. It dies with its node, and then all calls to it fail, as with Ray.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from svc.engine.device import DeviceCapabilities

ADDRESS = "127.0.0.1"
Reference = Future[Any]


@dataclass
class Node:
    """A node for one actor."""

    name: str
    alive: bool = True
    reserved: bool = False
    actors: list["Actor"] = field(default_factory=list)


@dataclass(eq=False)
class Group:
    """A placement group, which waits for its nodes until they are free."""

    size: int
    nodes: list[Node] = field(default_factory=list)
    reserved: Reference = field(default_factory=Future)

    def ready(self) -> Reference:
        """Return what is done when the nodes are reserved."""
        return self.reserved


class RayDouble:
    """A cluster of nodes for one actor each.

    Args:
        capabilities: what each node's device can do.
    """

    def __init__(self, nodes: int, capabilities: DeviceCapabilities) -> None:
        self.nodes = [Node(f"node-{number}") for number in range(nodes)]
        self.capabilities = capabilities
        self._groups = list[Group]()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace Ray's functions."""
        for name in ("get", "kill", "put", "remote", "wait"):
            monkeypatch.setattr(f"ray.{name}", getattr(self, f"_{name}"))
        monkeypatch.setattr("ray.nodes", lambda: [self._described(node) for node in self.nodes])
        monkeypatch.setattr("ray.available_resources", lambda: {"CPU": float(len(self._free()))})
        monkeypatch.setattr("ray.util.placement_group", self._placement_group)
        monkeypatch.setattr("ray.util.remove_placement_group", self._remove_placement_group)

    def remove(self, node: Node) -> None:
        """Kill a node with its actors."""
        node.alive = False
        for actor in node.actors:
            actor.kill()

    def add(self) -> None:
        """Add a node."""
        self.nodes.append(Node(f"node-{len(self.nodes)}"))
        self._reserve()

    @property
    def running(self) -> list["Actor"]:
        """All actors that run."""
        return [actor for node in self.nodes for actor in node.actors if actor.is_running]

    def stop(self) -> None:
        """Kill all actors."""
        for node in self.nodes:
            self.remove(node)

    @staticmethod
    def _described(node: Node) -> dict[str, Any]:
        return {"Alive": node.alive, "NodeManagerHostname": node.name, "Resources": {"CPU": 1.0}}

    def _free(self) -> list[Node]:
        return [node for node in self.nodes if node.alive and not node.reserved]

    def _placement_group(self, bundles: Sequence[dict[str, float]], strategy: str) -> Group:
        self._groups.append(Group(len(bundles)))
        self._reserve()
        return self._groups[-1]

    def _reserve(self) -> None:
        for group in self._groups:
            if not group.nodes and len(free := self._free()) >= group.size:
                group.nodes = free[: group.size]
                for node in group.nodes:
                    node.reserved = True
                group.reserved.set_result(group)

    def _remove_placement_group(self, group: Group) -> None:
        self._groups.remove(group)
        for node in group.nodes:
            node.reserved = False
        self._reserve()

    def _remote(self, kind: type) -> "_ActorClass":
        return _ActorClass(kind, self.capabilities)

    @staticmethod
    def _put(value: object) -> Reference:
        done = Reference()
        done.set_result(value)
        return done

    @staticmethod
    def _get(refs: Reference | list[Reference], timeout: float | None = None) -> Any:
        return [ref.result(timeout) for ref in refs] if isinstance(refs, list) else refs.result(timeout)

    @staticmethod
    def _wait(
        refs: list[Reference], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Reference], list[Reference]]:
        done, rest = wait_for(refs, timeout, ALL_COMPLETED if num_returns == len(refs) else FIRST_COMPLETED)
        return list(done), list(rest)

    @staticmethod
    def _kill(actor: "Actor") -> None:
        actor.kill()


@dataclass
class _ActorClass:
    kind: type
    capabilities: DeviceCapabilities
    strategy: Any = None

    def options(self, *, scheduling_strategy: Any, **others: Any) -> "_ActorClass":
        return _ActorClass(self.kind, self.capabilities, scheduling_strategy)

    def remote(self, *arguments: Any) -> Any:
        if isinstance(self.strategy, NodeAffinitySchedulingStrategy):  # the actor that only has a name
            return SimpleNamespace(kill=lambda: None)
        node = self.strategy.placement_group.nodes[self.strategy.placement_group_bundle_index]
        actor = Actor(self.kind, arguments, node.name, self.capabilities)
        node.actors.append(actor)
        return actor


class Actor:
    """A process that runs the methods of an object in threads."""

    def __init__(self, kind: type, arguments: tuple[Any, ...], node: str, capabilities: DeviceCapabilities) -> None:
        context = get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, kind, arguments, node, capabilities), daemon=True)
        self._process.start()
        there.close()
        self._numbers, self._calls, self._lock = count(), dict[int, Reference](), threading.Lock()
        self._is_dead = False
        threading.Thread(target=self._receive, daemon=True).start()

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def __getattr__(self, method: str) -> "_Method":
        return _Method(lambda *arguments: self._call(method, arguments))

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Reference:
        values = tuple(each.result() if isinstance(each, Future) else each for each in arguments)
        ref = Reference()
        with self._lock:
            if self._is_dead:
                ref.set_exception(RayActorError())
                return ref
            number = next(self._numbers)
            self._calls[number] = ref
            with suppress(OSError):  # its death is noticed by the thread
                self._pipe.send((number, method, values))
        return ref

    def _receive(self) -> None:
        try:
            while True:
                number, value, error = self._pipe.recv()
                call = self._calls.pop(number)
                if error is None:
                    call.set_result(value)
                else:
                    call.set_exception(RayTaskError("", str(error), error))
        except (EOFError, OSError):
            with self._lock:
                self._is_dead = True
                for ref in self._calls.values():
                    ref.set_exception(RayActorError())


@dataclass
class _Method:
    remote: Callable[..., Reference]


class _Context:
    def __init__(self, node: str) -> None:
        self._node = node

    def get_node_id(self) -> str:
        return self._node


def _serve(
    pipe: Connection, kind: type, arguments: tuple[Any, ...], node: str, capabilities: DeviceCapabilities
) -> None:
    lock = threading.Lock()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as threads:
        patch.setattr("ray.get_runtime_context", lambda: _Context(node))
        patch.setattr("ray.util.get_node_ip_address", lambda: ADDRESS)
        patch.setattr("trainer.training.parallel.ray_worker.read_capabilities", lambda folder: capabilities)
        actor = kind(*arguments)

        def work(number: int, method: str, values: tuple[Any, ...]) -> None:
            result, failure = None, None
            try:
                result = getattr(actor, method)(*values)
            except Exception as error:  # noqa: BLE001 - raised again by the caller
                failure = error
            with lock:
                pipe.send((number, result, failure))

        try:
            while True:
                threads.submit(work, *pipe.recv())
        except EOFError:
            os._exit(1)
