"""Runs a Ray cluster of several nodes on this machine, for tests. The head runs no engines.

`ray.cluster_utils.Cluster` works in a process of its own, which this module is too, because Ray changes its process.
"""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

import psutil
import pytest


@dataclass
class RayNodes:
    """A running cluster.

    Attributes:
        address: address of its head.
    """

    address: str
    _process: "subprocess.Popen[str]"

    def add(self, name: str) -> None:
        """Add a node with one CPU."""
        self._do("add", name)

    def kill(self, name: str) -> None:
        """Kill a node as a power cut would, except that its processes' connections close."""
        self._do("kill", name)

    def remove(self, name: str) -> None:
        """Let a node leave."""
        self._do("remove", name)

    def restart_head(self) -> None:
        """Kill the head's process that knows the cluster, and start it again without its memory."""
        self._do("restart", "head")

    def _do(self, command: str, name: str) -> Any:
        ours, theirs = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        ours.write(json.dumps([command, name]) + "\n")
        ours.flush()
        return json.loads(theirs.readline())


@contextmanager
def running_cluster(*names: str) -> Iterator[RayNodes]:
    """Run a cluster with these nodes. This process and its children get the token to use it."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "token")
        environment.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_cluster"],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # a signal to the tests' group must not end the nodes before their engines
        )
        assert process.stdout
        try:
            nodes = RayNodes(json.loads(process.stdout.readline()), process)
            for name in names:
                nodes.add(name)
            yield nodes
        finally:
            process.communicate()


def actors() -> list[psutil.Process]:
    """Return the processes of engines' actors on this machine."""
    return [
        each for each in psutil.process_iter(["cmdline"]) if "ray::EngineActor" in " ".join(each.info["cmdline"] or ())
    ]


def _main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes: dict[str, Any] = {}

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer(cluster.address)
    for line in sys.stdin:
        command, name = json.loads(line)
        if command == "add":
            nodes[name] = cluster.add_node(num_cpus=1, resources={name: 1})
        elif command == "restart":
            cluster.head_node.kill_gcs_server()
            cluster.head_node.start_gcs_server()
        else:
            cluster.remove_node(nodes.pop(name), allow_graceful=command == "remove")
        answer(None)
    cluster.shutdown()


if __name__ == "__main__":
    _main()
