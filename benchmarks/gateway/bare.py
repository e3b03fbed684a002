"""The way to the engine alone: our HTTP server and our connections to the engine, with nothing of a gateway in between.

What this costs, no gateway on the same server costs less than; what `svc serve` costs more is what it does.
"""

import asyncio
import socket
import sys
from pathlib import Path

import uvloop
from starlette.types import Receive, Scope, Send

from benchmarks.gateway.peers import MOST_STREAMS
from serving.http.http_server import http_server
from svc.engine.vllm.connection_pool import EngineConnections

_BACKLOG = 2048


class PassThrough:
    """An ASGI application that passes each request to one engine, and its answer back."""

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
    """Until it is ended."""
    with socket.create_server(("127.0.0.1", port), backlog=_BACKLOG) as listener:
        listener.setblocking(False)
        app = PassThrough(EngineConnections(upstream, silence_s=300.0))
        await http_server(app, 2 * MOST_STREAMS).serve(sockets=[listener])


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
