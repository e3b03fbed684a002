"""Our HTTP server and our connections to the engine, without the gateway in between.

This is a lower bound for the cost of any gateway on the same server. The additional cost of `svc serve`
is the gateway's own work.
"""

import asyncio
import socket
import sys
from pathlib import Path

import uvloop
from starlette.types import Receive, Scope, Send

from benchmarks.gateway.peers import MAX_STREAMS
from serving.server.http_server import HttpServer
from svc.engine.vllm.connection_pool import EngineConnections

_BACKLOG = 2048


class PassThrough:
    """ASGI application that forwards each request to a single engine and returns its response."""

    def __init__(self, engine: EngineConnections) -> None:
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        async with self._engine.post(scope["path"], body, "benchmark") as answer:
            head = [(b"content-type", answer.content_type.encode())]
            if not answer.is_event_stream:
                whole = await answer.read()
                head.append((b"content-length", b"%d" % len(whole)))
                await send({"type": "http.response.start", "status": answer.status, "headers": head})
                await send({"type": "http.response.body", "body": whole})
                return
            await send({"type": "http.response.start", "status": answer.status, "headers": head})
            while part := await answer.read_some():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def serve(upstream: Path, port: int) -> None:
    """Serve requests until the process is stopped."""
    with socket.create_server(("127.0.0.1", port), backlog=_BACKLOG) as listener:
        listener.setblocking(False)
        app = PassThrough(EngineConnections(upstream, silence_s=300.0))
        await HttpServer(app, 2 * MAX_STREAMS).serve(sockets=[listener])


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
