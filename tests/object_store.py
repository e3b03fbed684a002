"""Runs a real S3 server for tests, moto, behind a proxy that fails on demand."""

import http.client
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

_STALL_S = 4.0
_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "server", "date"}
_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test-key-id",
    "AWS_SECRET_ACCESS_KEY": "test-secret-that-is-never-shown",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}
_buckets = itertools.count(1)


class Fault(Enum):
    """What the proxy does to a request instead of forwarding it and returning the answer."""

    ERROR = auto()
    """Answers 500 without forwarding the request."""
    LOST = auto()
    """Forwards the request, and closes the connection without an answer."""
    CUT = auto()
    """Closes the connection in the middle of the answer's body."""
    STALL = auto()
    """Does not answer for 4 s."""
    UNCONDITIONAL = auto()
    """Forwards the request without its condition, as some stores treat it."""


@dataclass
class Bucket:
    """A new bucket, its URL, and the faults of the requests to come.

    Attributes:
        fault: called with the method and path of each request; returns the fault, or None.
        requests: method and path of each request so far.
    """

    url: str
    fault: Callable[[str, str], Fault | None] = lambda method, path: None
    requests: list[tuple[str, str]] = field(default_factory=list)

    def fail(self, fault: Fault, method: str, part: str, times: int = 1) -> None:
        """Apply a fault to the next requests with this method and with this part in their path."""
        left = itertools.repeat(None, times)

        def choose(asked: str, path: str) -> Fault | None:
            matches = asked == method and part in path
            return fault if matches and next(left, fault) is None else None

        self.fault = choose


@contextmanager
def running_s3() -> Iterator[Callable[[], Bucket]]:
    """Run the server and the proxy, with the environment that leads clients there. Yields a function that creates a
    bucket.
    """
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    address = moto.get_host_and_port()
    current: list[Bucket] = []

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            bucket = current[-1]
            bucket.requests.append((self.command, self.path))
            fault = bucket.fault(self.command, self.path)
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if fault is Fault.STALL:
                time.sleep(_STALL_S)
            if fault is Fault.ERROR:
                self.send_response(500)
                self.send_header("content-length", "0")
                self.end_headers()
                return
            headers = dict(self.headers)
            if fault is Fault.UNCONDITIONAL:
                headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
            upstream = http.client.HTTPConnection(*address)
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
            if fault is Fault.LOST:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            size = answer.getheader("content-length") if self.command == "HEAD" else str(len(content))
            self.send_header("content-length", size or "0")
            self.end_headers()
            if fault is Fault.CUT:
                content = content[: len(content) // 2]
                self.close_connection = True
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    def new_bucket() -> Bucket:
        bucket = Bucket(f"s3://bucket-{next(_buckets)}/some/prefix")
        connection = http.client.HTTPConnection(*address)
        connection.request("PUT", "/" + bucket.url.split("/")[2])
        connection.getresponse().read()
        connection.close()
        current.append(bucket)
        return bucket

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in _ENVIRONMENT.items():
                patch.setenv(name, value)
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
            yield new_bucket
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        moto.stop()
