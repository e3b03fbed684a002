"""Passes the events of a streamed answer on, as they come, and times and counts its tokens.

The chunk with token counts, which the engine is always asked for, goes to those clients alone that asked for it too.
"""

from collections.abc import Callable, Sequence

from serving.engines.transport import EngineDiedError, refusal
from serving.http.delivery import Delivery
from serving.http.request_account import RequestAccount
from serving.protocols.server_sent_events import EventSplitter
from serving.protocols.wire_formats import TOKEN, WireFormat
from svc.engine.vllm.connection_pool import EngineAnswer
from svc.errors import EngineError


class EventStream:
    """Of one answer.

    Args:
        begin: begins the answer to the client, with this content type.
        between_tokens: observes the seconds between two tokens.
        wants_usage: the client asked for the chunk with token counts.
        show: rewrites each event first; see serving.engines.balancer.Lease.
    """

    def __init__(
        self,
        account: RequestAccount,
        delivery: Delivery,
        format: WireFormat,
        begin: Callable[[str], None],
        between_tokens: Callable[[float], None],
        *,
        wants_usage: bool,
        show: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self._account = account
        self._key = account.key
        self._delivery = delivery
        self._format = format
        self._begin = begin
        self._between_tokens = between_tokens
        self._wants_usage = wants_usage
        self._show = show
        self._splitter = EventSplitter()
        self._last_token: float | None = None
        self._content_type = ""
        self._left = b""  # what the client did not take at once
        self._error: EngineError | None = None

    async def forward(self, answer: EngineAnswer) -> None:
        """Until the end of the answer.

        Raises:
            EngineError: an error of the engine within the stream, or an end before the last event.
        """
        self._content_type = answer.content_type
        while not await answer.pass_to(self._take):
            await self._delivery.put_event(self._left)
            if self._error is not None:
                raise self._error
        if not self._account.complete:
            raise EngineDiedError("the engine went away; it is being restarted")

    def _take(self, chunk: bytes) -> bool:
        """Passes on what has come; whether the client took it at once.

        Raises:
            EngineError: one within the stream.
        """
        events = self._splitter.feed(chunk)
        if self._show is not None:
            events = [self._show(event) for event in events]
        if self._account.begun and len(events) == 1 and self._format.is_plain_token(events[0]):  # as nearly always
            event = events[0]
            self._account.keep(event)
            self._time_token()
            if self._delivery.put_at_once(event):
                return True
            self._left = event
            return False
        return self._take_all(events)

    def _take_all(self, events: Sequence[bytes]) -> bool:
        if not self._account.begun:
            self._account.heard()
        passed: list[bytes] = []
        try:
            for event in events:
                if self._passes(event):
                    passed.append(event)
        except EngineError as error:
            self._error = error  # after what came together with it, and before it
        if passed:
            if not self._account.begun:
                self._begin(self._content_type)
            data = passed[0] if len(passed) == 1 else b"".join(passed)
            if not self._delivery.put_at_once(data):
                self._left = data
                return False
        if self._error is not None:
            raise self._error
        return True

    def _passes(self, event: bytes) -> bool:
        """Looks at an event; whether the client gets it."""
        seen = self._format.classify(event)
        if seen.error is not None:
            code = seen.error.get("code") if isinstance(seen.error, dict) else None
            raise refusal(code if isinstance(code, int) else 500, seen.error)
        self._account.keep(event)
        if seen is TOKEN:
            self._time_token()
            return True
        if seen.finish_reason:
            self._account.finished(seen.finish_reason)
        if seen.usage:
            self._account.used(seen.usage)
        if seen.end:
            self._account.completed()
        if seen.token:
            self._time_token()
        return self._wants_usage or not seen.usage

    def _time_token(self) -> None:
        self._key.token_events += 1  # for an answer whose tokens the engine will not tell
        now = self._account.elapsed()
        if self._last_token is None:
            self._account.first_token(now)
        else:
            self._between_tokens(now - self._last_token)
        self._last_token = now
