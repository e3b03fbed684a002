"""Admission between HTTP and the engines: counts what runs, and queues what comes while no engine may take it.

While an engine is changed and no other takes requests, those that come wait, and none of them sees more than one
version. Where all places are taken, those of keys wait too, and share what comes free by the weights of their keys;
without a key a request is refused, unless others wait, behind which it has its share. The queue and the wait are
bounded: whatever a client can grow has a limit. The server's own requests have a place beside all this, behind every
request. Knows nothing of HTTP, of versions, or of why an engine is changed.

One event loop, no locks: every change of state happens between two awaits.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from serving.admission.background_slot import BackgroundSlot
from serving.admission.errors import (
    EngineUnavailableError,
    OverloadedError,
    QueueOverflowError,
    QueueTimeoutError,
    TooManyTokensError,
)
from serving.admission.party import Party
from serving.admission.queue import RequestQueue

_ENDED_POLL_S = 0.05


class Admission:
    """Who may run in the engine, who waits, and who is sent away.

    Three facts decide: whether an engine takes requests, whether one is being changed (a swap), and whether all places
    or all tokens are taken: a request counts by what its answers may take, since one can ask for hundreds. Where no
    engine takes requests, admission is closed while one is being changed, whatever becomes of it: a swap that has to
    restart the engine keeps the requests that it queued. Otherwise they are refused. Starts with no engine.

    Args:
        max_running: requests in the engine at once.
        max_tokens: that their answers may have together.
        max_queued: requests that wait.
        queue_timeout_s: longest wait of one request, seconds.
        wake_timeout_s: the same for an engine that was ended because nobody asked, seconds.

    Attributes:
        running: requests in the engine.
        closed_s: how long admission was closed in the last change, seconds; None where it never was.
        queue: requests that wait.
        background_slot: the place of the server's own request.
    """

    def __init__(
        self,
        *,
        max_running: int,
        max_tokens: int,
        max_queued: int,
        queue_timeout_s: float,
        wake_timeout_s: float | None = None,
    ) -> None:
        self._max_running = max_running
        self._max_tokens = max_tokens
        self._queue_timeout_s = queue_timeout_s
        self._wake_timeout_s = wake_timeout_s or queue_timeout_s
        self._asleep = False
        self._last_ended_at = time.monotonic()
        self.running = self._tokens = self._preparing = 0
        self._changing = False
        self._ready = False
        self._unavailable: str | None = "the engine is starting"
        self._closed_at: float | None = None
        self.closed_s: float | None = None
        self.queue = RequestQueue(max_queued=max_queued)
        self.background_slot = BackgroundSlot()

    @property
    def queued(self) -> int:
        """Requests that wait, for a place or for an adapter."""
        return len(self.queue) + self._preparing

    @property
    def _closed(self) -> bool:
        return (self._changing or self._asleep) and not self._ready

    @property
    def idle_s(self) -> float:
        """How long no request has run or waited, seconds."""
        return 0.0 if self.running or self.queue or self._preparing else time.monotonic() - self._last_ended_at

    @property
    def unavailable_reason(self) -> str | None:
        """Why there is no engine; None when there is one, also where it is being changed or comes when it is asked."""
        return None if self._asleep else self._unavailable

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """A request waits for something else in the body, before it takes a place: the model is not idle."""
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1
            self._last_ended_at = time.monotonic()

    async def enter(self, tokens: int, party: Party, *, may_wait: bool = False) -> None:
        """Takes a place until `leave`, after a wait where there is none.

        Args:
            tokens: most that the answers may have; what a place costs.
            party: whose request it is.
            may_wait: it waits for a place as the requests of keys do, also without a key: it has waited already.

        Raises:
            TooManyTokensError: more than may ever run.
            EngineUnavailableError: there is no engine.
            QueueOverflowError, QueueTimeoutError: came while an engine was changed; too many wait, or it waited
                `queue_timeout_s`.
            OverloadedError: came while requests were taken; all places are taken, and it may not wait, or did in vain.
        """
        if tokens > self._max_tokens:
            raise TooManyTokensError(
                f"the answers may take {tokens} tokens",
                expected=f"at most {self._max_tokens} in one request: a smaller 'n' or 'max_tokens'",
            )
        if self._closed or not self._enter(tokens, party, may_wait or party.has_key):
            await self._wait(tokens, party)

    async def ended(self) -> None:
        """Returns when no request runs or waits. Of use only where none comes any more."""
        while self.running or self.queue or self._preparing:
            await asyncio.sleep(_ENDED_POLL_S)

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """An engine is changed in the body: requests that no engine takes meanwhile are queued and not refused.

        Raises:
            RuntimeError: one is being changed already; swaps come one at a time.
        """
        if self._changing:
            raise RuntimeError("an engine is being changed already")
        self._changing, self.queue.most, self.closed_s = True, len(self.queue), None
        self._settle()
        try:
            yield
        finally:
            self._changing = False
            self._settle()

    def sleep(self) -> None:
        """From now on requests that no engine takes are queued, for as long as a start may take: one comes for them."""
        self._asleep = True
        self._settle()

    def wake(self) -> None:
        """From now on requests that no engine takes are refused, those that wait too."""
        self._asleep = False
        self._settle()

    def unavailable(self, reason: str | None) -> None:
        """No engine takes requests from now on: new ones are refused at once, or queued while one is being changed.

        Args:
            reason: shown to clients, as "the engine is starting"; no paths. None of an engine that is being changed:
                it was well, and is to be again.
        """
        self._ready, self._unavailable = False, reason or self._unavailable
        self.background_slot.end()
        self._settle()

    def available(self) -> None:
        """An engine takes requests from now on."""
        self._ready, self._unavailable = True, None
        self._settle()

    def _settle(self) -> None:
        """Draws the conclusions of a change: for those that wait, for the background, for the clock."""
        now = time.monotonic()
        if self._closed and self._closed_at is None:
            self._closed_at = now
        elif not self._closed and self._closed_at is not None:
            self.closed_s = (self.closed_s or 0.0) + now - self._closed_at
            self._closed_at = None
        self._admit_waiting()
        self._show()

    def _enter(self, tokens: int, party: Party, may_wait: bool) -> bool:
        """Takes a place; False where the request has to wait for one, behind others that do or because it may."""
        if not self._ready:
            raise self._no_engine()
        if self.queue:
            return False
        if self._take_place(tokens):
            self.queue.charge(party, tokens)
            return True
        if may_wait:
            return False
        raise OverloadedError(self._full, todo="send the request again later")

    def _no_engine(self) -> EngineUnavailableError:
        return EngineUnavailableError(
            self._unavailable or "the engine is being changed", todo="send the request again later"
        )

    @property
    def _full(self) -> str:
        return (
            f"{self.running} requests are running, which may make {self._tokens} tokens; at most "
            f"{self._max_running} and {self._max_tokens} may at once"
        )

    def _take_place(self, tokens: int) -> bool:
        """Takes a place; False where there is none."""
        if self.running >= self._max_running or self._tokens + tokens > self._max_tokens:
            return False
        self.running += 1
        self._tokens += tokens
        self._show()
        return True

    def leave(self, tokens: int) -> None:
        """Gives the place back."""
        self.running -= 1
        self._tokens -= tokens
        self._last_ended_at = time.monotonic()
        if self.queue:
            self._admit_waiting()
        self._show()

    async def _wait(self, tokens: int, party: Party) -> None:
        """Returns with a place taken."""
        timeout_s, closed = self._wake_timeout_s if self._asleep else self._queue_timeout_s, self._closed
        try:
            place = self.queue.join(party, tokens)
            self._admit_waiting()  # it may be its turn at once, and fit where the one before it does not
            await self.queue.until_given(place, timeout_s, lambda: self.leave(tokens))
            while self._closed:  # a change began after the place was given, and before this task ran again
                closed = True
                self.leave(tokens)
                place = self.queue.rejoin(place)
                await self.queue.until_given(place, timeout_s, lambda: self.leave(tokens))
        except (QueueOverflowError, QueueTimeoutError) as error:
            if closed:
                raise
            raise OverloadedError(f"{error.wrong}; {self._full}", todo=error.todo) from error

    def _admit_waiting(self) -> None:
        """Gives free places to the requests whose turn it is; with no engine, sends all away."""
        if self._closed:
            return
        if self._ready:
            self.queue.give(self._take_place)
        else:
            self.queue.send_away(self._no_engine)

    def _show(self) -> None:
        self.background_slot.show(open=self._ready, running=self.running)
