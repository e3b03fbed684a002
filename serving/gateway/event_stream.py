"""Forwards the events of a streamed answer as they arrive, counts its tokens and measures the time between them.

The chunk with token counts is always requested from the engine, but is forwarded only to clients that
requested it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.engines.transport import EngineDiedError, refusal
from serving.gateway.delivery import Delivery
from serving.gateway.request import Request
from serving.protocols.server_sent_events import EventSplitter
from serving.protocols.wire_formats import TOKEN, WireFormat
from svc.engine.vllm.connection_pool import EngineAnswer
from svc.errors import EngineError


@dataclass(slots=True)
class EventStream:
    """Forwards a single streamed answer to its client.

    Attributes:
        begin: called with the engine's content type to begin the response to the client.
        between_tokens: called with the seconds between the arrivals of two consecutive tokens from the engine. With a
            slow client, tokens may be read from the buffer much later than they arrived.
        wants_usage: whether the client requested the chunk with token counts.
        show: function that rewrites each event before it is forwarded; see serving.engines.balancer.Lease.
    """

    request: Request
    delivery: Delivery
    format: WireFormat
    begin: Callable[[str], None]
    between_tokens: Callable[[float], None]
    wants_usage: bool
    show: Callable[[bytes], bytes] | None = None
    _arrived: float = 0.0
    _last_token: float | None = None

    async def forward(self, answer: EngineAnswer) -> None:
        """Forward the answer's events to the client until the answer ends.

        Raises:
            EngineError: the engine sent an error within the stream, or the stream ended before its last event.
        """
        splitter = EventSplitter()
        while part := await answer.read_some():
            self._arrived = answer.arrived
            events = splitter.feed(part)
            if self.show is not None:
                events = [self.show(event) for event in events]
            if self.request.begun and len(events) == 1 and self.format.is_plain_token(events[0]):  # the usual case
                self.request.keep(events[0])
                self._time_token()
                await self.delivery.put_event(events[0])
            else:
                await self._pass_on(events, answer.content_type)
        if not self.request.complete:
            raise EngineDiedError("the engine stopped; it is being restarted")

    async def _pass_on(self, events: Sequence[bytes], content_type: str) -> None:
        if not self.request.begun:
            self.request.answer_arrived()
        passed: list[bytes] = []
        failure: EngineError | None = None
        try:
            passed.extend(event for event in events if self._passes(event))
        except EngineError as error:
            failure = error  # raised after the events that arrived before it in the same part
        if passed:
            if not self.request.begun:
                self.begin(content_type)
            await self.delivery.put_event(b"".join(passed))
        if failure is not None:
            raise failure

    def _passes(self, event: bytes) -> bool:
        """Record what an event contains, and return whether to forward it to the client."""
        event_kind = self.format.classify(event)
        if event_kind.error is not None:
            code = event_kind.error.get("code") if isinstance(event_kind.error, dict) else None
            raise refusal(code if isinstance(code, int) else 500, event_kind.error)
        self.request.keep(event)
        if event_kind is TOKEN:
            self._time_token()
            return True
        if event_kind.finish_reason:
            self.request.finished(event_kind.finish_reason)
        if event_kind.usage:
            self.request.used(event_kind.usage)
        if event_kind.end:
            self.request.completed()
        if event_kind.token:
            self._time_token()
        return self.wants_usage or not event_kind.usage

    def _time_token(self) -> None:
        self.request.token_events += 1  # for an answer whose token counts the engine does not send
        if self._last_token is None:
            self.request.first_token(self.request.elapsed())
        else:
            self.between_tokens(self._arrived - self._last_token)
        self._last_token = self._arrived
