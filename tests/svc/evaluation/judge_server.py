"""An OpenAI endpoint on a real socket, whose model gives predefined verdicts."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, str], str]
"""Function from the answers shown as A and B to the model's reply."""


@dataclass
class JudgeServer:
    """State of the server and the requests it received.

    Attributes:
        answer: function that gives the model's replies.
        failures: status codes and headers that the first requests get instead of an answer.
        requests: request bodies, in order.
        keys: `authorization` header of each request.
    """

    answer: Answer
    failures: list[tuple[int, dict[str, str], str]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""
    body: bytes | None = None

    def respond(self, body: dict[str, Any], key: str | None) -> tuple[int, dict[str, str], bytes]:
        """Return the response to one request."""
        self.requests.append(body)
        self.keys.append(key)
        if self.failures:
            status, headers, text = self.failures.pop(0)
            return status, headers, text.encode()
        if self.body is not None:
            return 200, {}, self.body
        question = body["messages"][-1]["content"]
        first, second = question.split("# Answer A\n\n")[1].split("\n\n# Answer B\n\n")
        message = {"role": "assistant", "content": self.answer(first, second)}
        return 200, {}, json.dumps({"choices": [{"index": 0, "message": message}]}).encode()


@contextmanager
def judge_server(answer: Answer, **options: Any) -> Iterator[JudgeServer]:
    """Run a server while the context is active."""
    judge = JudgeServer(answer, **options)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            right = self.path == "/v1/chat/completions"
            status, headers, content = (
                judge.respond(body, self.headers["authorization"]) if right else (404, {}, b"no such path")
            )
            self.send_response(status)
            for name, value in (headers | {"content-length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            """Suppress log output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        judge.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield judge
        finally:
            server.shutdown()
            thread.join()
