"""Builds the status of a server, and a server with fixed pages."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STATE: dict[str, Any] = {
    "model": "tiny",
    "version": "tiny@2",
    "format": "gptq",
    "previous": "tiny@1 (gptq)",
    "engine": {
        "state": "ready",
        "restarts": 1,
        "last_error": None,
        "plan": [
            {"name": "threads", "value": 2, "origin": "machine", "reason": "2 cores of this process"},
            {"name": "block_size", "value": "[auto]", "origin": "vLLM's default", "reason": ""},
        ],
    },
    "requests": {"running": 3, "queued": 4},
    "engines": [{"replica": 0, "state": "ready", "version": "tiny@2", "running": 5, "adapters": None}],
    "last_swap": {
        "to": "tiny@2 (gptq)",
        "started_at": "2026-01-02T03:04:05+00:00",
        "outcome": "succeeded",
        "reason": None,
        "kind": "inplace",
        "took_s": 2.5,
        "queued_s": 1.234,
        "running": 5,
        "queued": 6,
    },
}
SERVER: dict[str, Any] = {"models": [STATE], "refused": {}, "pid": 1}


@contextmanager
def serving(pages: dict[str, tuple[int, str]]) -> Iterator[str]:
    """Run a server with fixed pages and yield its URL."""

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = pages[self.path]
            self.send_response(status)
            self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: object) -> None:
            """Suppress the log output of the HTTP server."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
