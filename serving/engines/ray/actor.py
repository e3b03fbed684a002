"""The Ray actor that runs an engine. It only starts an `EngineNode` in a separate thread, and reports its address.

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
from serving.engines.ray.node import EngineNode

Listening = tuple[str, int, str]
"""The machine's address, the port for commands, and the actor's certificate in PEM format."""


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
        self._listening: Future[Listening] = Future()
        threading.Thread(target=self._run, args=(name, folder, peer), daemon=True).start()

    def listening(self) -> Listening:
        """Return the address, port and certificate for sending commands to this actor."""
        return self._listening.result(timeout=60)

    def _run(self, name: str, folder: str, peer: str) -> None:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(name, Path(folder).expanduser(), peer))
        os._exit(0)  # the actor is no longer needed; this frees its resources

    async def _serve(self, name: str, folder: Path, peer: str) -> None:
        import ray

        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            host, identity = str(ray.util.get_node_ip_address()), make_identity()
            node = EngineNode(name, folder, host, identity, peer)
            listener, port = await node.listen()
        except BaseException as error:
            self._listening.set_exception(error)
            raise
        self._listening.set_result((host, port, identity.certificate))
        async with listener:
            await node.finished()
