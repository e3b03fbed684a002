"""A receiver for OTLP spans over HTTP: a real server on a port that parses the protocol."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

ERROR, UNSET = 2, 0
SERVER = Span.SpanKind.SPAN_KIND_SERVER


@dataclass(frozen=True)
class ReceivedSpan:
    """A span received from a sender.

    Attributes:
        parent: id of the parent span in hexadecimal, like the other ids; empty if there is none.
        resource: resource attributes of the sender.
    """

    name: str
    trace: str
    id: str
    parent: str
    state: str
    kind: int
    status: int
    seconds: float
    attributes: Mapping[str, Any]
    resource: Mapping[str, Any]


@dataclass
class OtlpReceiver:
    """The requests received so far and the configured responses.

    Attributes:
        url: base URL.
        status: status code of the responses.
        heads: headers of the requests, with names in lower case.
        paths: paths of the requests.
        bodies: bodies of the requests.
        go_on: event before which the receiver is not responding.
    """

    url: str = ""
    status: int = 200
    spans: list[ReceivedSpan] = field(default_factory=list)
    heads: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)

    def take(self, path: str, head: dict[str, str], body: bytes) -> None:
        """Receive and record one request."""
        self.paths.append(path)
        self.heads.append(head)
        self.bodies.append(body)
        if self.status == 200:
            self.spans += _spans(body)


def _spans(body: bytes) -> Iterator[ReceivedSpan]:
    for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = _values(of_resource.resource.attributes)
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield ReceivedSpan(
                    name=span.name,
                    trace=span.trace_id.hex(),
                    id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    state=span.trace_state,
                    kind=span.kind,
                    status=span.status.code,
                    seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
                    attributes=_values(span.attributes),
                    resource=resource,
                )


def _values(attributes: Any) -> dict[str, Any]:
    found: list[KeyValue] = list(attributes)
    return {each.key: _value(each.value) for each in found}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    assert kind
    return [_value(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@contextmanager
def otlp_receiver(*, answers: bool = True) -> Iterator[OtlpReceiver]:
    """Run a receiver while the context is active.

    Args:
        answers: whether to respond immediately; otherwise it responds only after its `go_on` is set.
    """
    receiver = OtlpReceiver()
    if answers:
        receiver.go_on.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.go_on.wait(30)
            receiver.take(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(receiver.status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.go_on.set()
        server.shutdown()
        server.server_close()
