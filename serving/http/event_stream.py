"""Passes the events of a streamed answer on, as they come, and times and counts its tokens.

The chunk with token counts, which the engine is always asked for, goes to those clients alone that asked for it too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.http.delivery import Delivery
from serving.http.request_account import RequestAccount
from serving.protocols.server_sent_events import EventSplitter
from serving.protocols.wire_formats import TOKEN, WireFormat
from serving.replicas.transport import EngineDiedError, refusal
from svc.engine.vllm.connection_pool import EngineAnswer
from svc.errors import EngineError


@dataclass(slots=True)
class EventStream:
    """One streamed answer.

    Attributes:
        begin: begins the answer to the client, with this content type.
        between_tokens: observes the seconds between two tokens, as they came from the engine: a part may be read much
            later, when a slow client has taken those before.
        wants_usage: the client asked for the chunk with token counts.
        show: rewrites each event first; see serving.replicas.balancer.Lease.
    """

    account: RequestAccount
    delivery: Delivery
    format: WireFormat
    begin: Callable[[str], None]
    between_tokens: Callable[[float], None]
    wants_usage: bool
    show: Callable[[bytes], bytes] | None = None
    _arrived: float = 0.0
    _last_token: float | None = None

    async def forward(self, answer: EngineAnswer) -> None:
        """Until the end of the answer.

        Raises:
            EngineError: an error of the engine within the stream, or an end before the last event.
        """
        splitter = EventSplitter()
        while part := await answer.read_some():
            self._arrived = answer.arrived
            events = splitter.feed(part)
            if self.show is not None:
                events = [self.show(event) for event in events]
            if self.account.begun and len(events) == 1 and self.format.is_plain_token(events[0]):  # as nearly always
                self.account.keep(events[0])
                self._time_token()
                await self.delivery.put_event(events[0])
            else:
                await self._pass_on(events, answer.content_type)
        if not self.account.complete:
            raise EngineDiedError("the engine went away; it is being restarted")

    async def _pass_on(self, events: Sequence[bytes], content_type: str) -> None:
        if not self.account.begun:
            self.account.heard()
        passed: list[bytes] = []
        failure: EngineError | None = None
        try:
            passed.extend(event for event in events if self._passes(event))
        except EngineError as error:
            failure = error  # after what came together with it, and before it
        if passed:
            if not self.account.begun:
                self.begin(content_type)
            await self.delivery.put_event(b"".join(passed))
        if failure is not None:
            raise failure

    def _passes(self, event: bytes) -> bool:
        """Look at an event; return whether the client gets it."""
        seen = self.format.classify(event)
        if seen.error is not None:
            code = seen.error.get("code") if isinstance(seen.error, dict) else None
            raise refusal(code if isinstance(code, int) else 500, seen.error)
        self.account.keep(event)
        if seen is TOKEN:
            self._time_token()
            return True
        if seen.finish_reason:
            self.account.finished(seen.finish_reason)
        if seen.usage:
            self.account.used(seen.usage)
        if seen.end:
            self.account.completed()
        if seen.token:
            self._time_token()
        return self.wants_usage or not seen.usage

    def _time_token(self) -> None:
        self.account.key.token_events += 1  # for an answer whose tokens the engine will not tell
        if self._last_token is None:
            self.account.first_token(self.account.elapsed())
        else:
            self.between_tokens(self._arrived - self._last_token)
        self._last_token = self._arrived
