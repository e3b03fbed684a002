"""The parts of an engine that Ray calls on a machine of the cluster: a task that reads the machine's capabilities, and
the actor that runs the engine. The actor only starts an `EngineNode` in a separate thread, and reports its address.

Ray never restarts an actor. Restarting is left to the server, which knows what to load and when. If a server is killed,
its actors and their engines keep running until the next server adopts or stops them.
"""

import asyncio
import contextlib
import os
import threading
from concurrent.futures import Future
from pathlib import Path

from serving.engines.ray.identity import make_identity
from serving.engines.ray.link import Placed
from serving.engines.ray.node import EngineNode
from svc.engine.device import DeviceCapabilities, read_capabilities


def machine_capabilities(folder: str) -> DeviceCapabilities:
    """Return the capabilities of the machine that runs this task.

    Args:
        folder: see `RaySettings.folder`.
    """
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides the GPUs from a task that reserves none
    return read_capabilities(_made(folder))


def _made(folder: str) -> Path:
    place = Path(folder).expanduser()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


class EngineActor:
    """A Ray actor that runs one engine for a server.

    Args:
        name: name of the actor.
        folder: see `RaySettings.folder`.
        peer: the server's certificate in PEM format.
    """

    def __init__(self, name: str, folder: str, peer: str) -> None:
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it to the actor's CPUs; the engine's plan decides
        # Ray's workers have niceness 15. Next to other work, an engine of niceness 19 got 1 s of CPU time in 64.
        with contextlib.suppress(PermissionError):  # see docs/ray.md
            os.setpriority(os.PRIO_PROCESS, 0, min(0, os.getpriority(os.PRIO_PROCESS, 0)))
        self._listening: Future[Placed] = Future()
        threading.Thread(target=self._run, args=(name, folder, peer), daemon=True).start()

    def listening(self) -> Placed:
        """Return the address, port and certificate for sending commands to this actor."""
        return self._listening.result(timeout=60)

    def _run(self, name: str, folder: str, peer: str) -> None:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(name, folder, peer))
        os._exit(0)  # the actor is no longer needed; this frees its resources

    async def _serve(self, name: str, folder: str, peer: str) -> None:
        import ray

        try:
            host, identity = str(ray.util.get_node_ip_address()), make_identity()
            node = EngineNode(name, _made(folder), host, identity, peer)
            listener, port = await node.listen()
        except BaseException as error:
            self._listening.set_exception(error)
            raise
        self._listening.set_result(Placed(host, port, identity.certificate))
        async with listener:
            await node.finished()
