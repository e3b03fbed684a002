"""Parses requests and ignores offers of another protocol (`Upgrade: h2c`), as RFC 9110 section 7.8 allows.

Java's HttpClient and `curl --http2` send such offers. httptools stops at the head of the request and skips the body,
whose bytes would be parsed as the next request. So the head is parsed a second time, without its `Upgrade` header; the
first time, no request begins.
"""

from array import array

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class RequestParser(httptools.HttpRequestParser):
    """Parser of one connection.

    Args:
        protocol: receives the requests. Its callbacks return early while the parser `ignores_head`.
    """

    def __init__(self, protocol: HttpToolsProtocol) -> None:
        self._protocol = protocol
        self._reset()

    @property
    def ignores_head(self) -> bool:
        """Whether the current head offers another protocol and is parsed again without the offer."""
        return self.should_upgrade() and self.get_method() != b"CONNECT"

    def feed_data(self, data: "bytes | bytearray | memoryview | array[int]") -> None:
        """Parse what was received.

        Raises:
            httptools.HttpParserError: the request is malformed.
            httptools.HttpParserUpgrade: behind a CONNECT request.
        """
        while True:
            try:
                super().feed_data(data)
            except httptools.HttpParserUpgrade as stop:
                if not self.ignores_head:
                    raise
                data = memoryview(data)[stop.args[0] :]
                head = self._head_without_offer()
                self._reset()
                super().feed_data(head)
            else:
                return

    def _reset(self) -> None:
        """Expect the first request of a connection: behind one with `Connection: close` nothing is parsed."""
        super().__init__(self._protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn's own

    def _head_without_offer(self) -> bytes:
        start = b"%b %b HTTP/%b" % (self.get_method(), self._protocol.url, self.get_http_version().encode("ascii"))
        lines = [b"%b: %b" % (name, value) for name, value in self._protocol.headers if name != b"upgrade"]
        return b"\r\n".join((start, *lines, b"", b""))
