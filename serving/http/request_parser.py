"""Parses requests, limits the size of their heads, and ignores protocol upgrades.

Java's HttpClient and `curl --http2` offer upgrades (`Upgrade: h2c`; RFC 9110, 7.8). httptools then stops
after the request's head, and would parse the body as the next request. The head is therefore parsed
again without its `Upgrade` header, and only the second pass begins a request.
"""

from array import array

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
"""Maximum size of a request's head or trailer, including other data that arrives in the same read, in bytes."""
MAX_WAITING = 512
"""Maximum number of unanswered requests per connection. A client that pipelines more is disconnected.
Without the limit, one client was able to queue 457,000 requests (1.2 GB) in 20 s."""


class RequestParser(httptools.HttpRequestParser):
    """Parser for one connection, placed between httptools and uvicorn's protocol, which receives the requests.

    Attributes:
        unanswered: number of requests that have begun and are unanswered; the code that answers them
            decrements it.
    """

    def __init__(self, requests: HttpToolsProtocol) -> None:
        self._requests: HttpToolsProtocol | None = requests
        self.unanswered = 0
        self._head_bytes = 0
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._reset()

    def feed_data(self, data: "bytes | bytearray | memoryview | array[int]") -> None:
        """Parse received data.

        Raises:
            httptools.HttpParserError: the request is malformed, or its head is too large.
        """
        self._head_bytes += len(data)
        while True:
            try:
                super().feed_data(data)
            except httptools.HttpParserUpgrade as stop:
                if not self._ignores_head:
                    return  # what follows a CONNECT request is not HTTP
                data = memoryview(data)[stop.args[0] :]
                head = self._head_without_offer()
                self._reset()
                super().feed_data(head)
            else:
                break
        if self._head_bytes > MAX_HEAD_BYTES:
            raise httptools.HttpParserError("the request's headers are too large")

    def close(self) -> None:
        """Release the reference to the protocol that receives the requests.

        The parser is part of a reference cycle, so only the garbage collector frees it.
        """
        self._requests = None

    @property
    def _ignores_head(self) -> bool:
        """Whether the current head offers a protocol upgrade and must be parsed again without the offer."""
        return self.should_upgrade() and self.get_method() != b"CONNECT"

    def _head_without_offer(self) -> bytes:
        start = b"%b %b HTTP/%b" % (self.get_method(), self._url, self.get_http_version().encode("ascii"))
        lines = [b"%b: %b" % (name, value) for name, value in self._headers if name.lower() != b"upgrade"]
        return b"\r\n".join((start, *lines, b"", b""))

    def _reset(self) -> None:
        """Reset the parser as if for a new connection.

        Otherwise, it would parse nothing after a request with `Connection: close`.
        """
        super().__init__(self)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn's own

    @property
    def _receiver(self) -> HttpToolsProtocol:
        if self._requests is None:
            raise httptools.HttpParserError("the connection is closed")
        return self._requests

    # Callbacks that httptools calls.

    def on_message_begin(self) -> None:
        self._url, self._headers = b"", []
        self._receiver.on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._receiver.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))
        self._receiver.on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        if self._ignores_head:
            return
        self.unanswered += 1
        if self.unanswered > MAX_WAITING:
            raise httptools.HttpParserError(
                f"more than {MAX_WAITING} requests on this connection are waiting for their responses"
            )
        self._receiver.on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        self._receiver.on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        if not self._ignores_head:
            self._receiver.on_message_complete()
