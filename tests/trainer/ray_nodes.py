"""A Ray cluster of several nodes on this machine, whose nodes tests can remove."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from trainer.training.parallel.ray_worker import RayWorker

_ENDS_S = 10.0


class RayNodes:
    """A cluster with a head that runs no workers, and nodes for one worker each."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.address: str = cluster.address

    def add(self) -> None:
        """Add a node."""
        self._cluster.add_node(num_cpus=1)

    def remove(self, prefix: str) -> None:
        """Kill a node, whose id begins with `prefix`, with all of its processes.

        Its processes are waited for: a zombie of this process would count as alive.
        """
        (node,) = (node for node in self._cluster.worker_nodes if node.node_id.startswith(prefix))
        processes = [info.process for infos in node.all_processes.values() for info in infos]
        self._cluster.remove_node(node, allow_graceful=False)
        for process in processes:
            process.wait()


@contextmanager
def running_nodes(count: int) -> Iterator[RayNodes]:
    """Yield a cluster with a number of nodes."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # else the workers starve on a busy machine
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = RayNodes(cluster)
        for _ in range(count):
            nodes.add()
        yield nodes
    finally:
        cluster.shutdown()


def nodes_of_workers(folder: Path) -> dict[str, bool]:
    """Return the beginning of the id of each node that works on a run, and whether it has written a checkpoint.

    Args:
        folder: setting `ray.folder` of the run.
    """
    runs = [path for path in folder.glob("training/*") if path.is_dir()]
    return {path.name.rpartition("-")[2]: any(path.glob("checkpoints/step-*")) for path in runs}


def workers_left() -> list[str]:
    """Return the workers that still run, after a moment in which they may end."""
    deadline = time.monotonic() + _ENDS_S
    while (left := list(_workers())) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _workers() -> Iterator[str]:
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if command.startswith(f"ray::{RayWorker.__name__}"):
            yield command
