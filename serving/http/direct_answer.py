"""Takes a request's body from its connection and writes the answer there as bytes, without ASGI's messages.

Each message passes all layers around an application as a dict, and the server in front looks at every header anew:
a sixth of what a chunk of a stream costs. Only good answers go this way, whose headers are all our own; errors, and
clients that take their answer slowly, go through messages. A connection is left in the state that messages would have
left it in, so an answer may begin here and go on there.
"""

from collections.abc import Callable
from typing import Any, Final

from starlette.types import Scope

from serving.http.header_lines import HeaderLines, header_line

_DIRECT: Final = "direct_answer"
_OK: Final = b"HTTP/1.1 200 OK\r\n"
_LAST_CHUNK: Final = b"0\r\n\r\n"


def _no_headers() -> HeaderLines:
    return b""


class DirectAnswer:
    """Of one request.

    Args:
        cycle: uvicorn's for the request and its answer.

    Attributes:
        common_headers: what every answer carries; set by the layer that adds them to messages.
    """

    __slots__ = ("_cycle", "common_headers")

    def __init__(self, cycle: Any) -> None:
        self._cycle = cycle
        self.common_headers: Callable[[], HeaderLines] = _no_headers

    @property
    def begun(self) -> bool:
        """An answer has begun, in this way or by messages."""
        begun: bool = self._cycle.response_started
        return begun

    @property
    def is_writable(self) -> bool:
        """The connection takes more without a wait. One that has ended takes and forgets everything."""
        return not self._cycle.flow.write_paused

    def take_body(self) -> bytes | None:
        """The body, where all of it has come; it is taken once. Otherwise None, and messages bring it."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected:
            return None
        body = bytes(cycle.body)
        cycle.body.clear()
        cycle.message_event.clear()
        cycle.flow.resume_reading()
        return body

    def write_whole(self, headers: HeaderLines, body: bytes) -> None:
        """A whole answer.

        Args:
            headers: its own ones, without its length.
        """
        cycle = self._cycle
        if cycle.disconnected:
            return
        head = self._head(headers)
        cycle.chunked_encoding = False
        cycle.transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        self._complete()

    def begin(self, headers: HeaderLines, part: bytes) -> None:
        """The head of an answer that comes in parts, with the first of them.

        Args:
            headers: its own ones.
        """
        cycle = self._cycle
        if cycle.disconnected:
            return
        head = self._head(headers)
        cycle.chunked_encoding = True
        cycle.transport.write(b"%btransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (head, len(part), part))

    def write(self, part: bytes) -> bool:
        """A further part, of at least a byte; whether the connection took it, as it does where it `is_writable`."""
        cycle = self._cycle
        if cycle.flow.write_paused:
            return False
        if not cycle.disconnected:
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
        return True

    def end(self) -> None:
        """The end of an answer that came in parts."""
        if not self._cycle.disconnected:
            self._cycle.transport.write(_LAST_CHUNK)
            self._complete()

    def _head(self, headers: HeaderLines) -> bytes:
        """The head of the answer, but for its length."""
        cycle = self._cycle
        default = b"".join(map(header_line, cycle.default_headers))
        close = b"" if cycle.keep_alive else b"connection: close\r\n"
        head = b"".join((_OK, default, headers, self.common_headers(), close))
        cycle.response_started, cycle.waiting_for_100_continue = True, False  # nothing above may fail any more
        return head

    def _complete(self) -> None:
        cycle = self._cycle
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()


def direct_answer(scope: Scope) -> DirectAnswer | None:
    """That of a request; None where its server has none."""
    found: DirectAnswer | None = scope["state"].get(_DIRECT)
    return found


def offer_direct_answer(cycle: Any) -> None:
    """Lets the application answer a request so."""
    cycle.scope["state"][_DIRECT] = DirectAnswer(cycle)
