"""Admission between HTTP and the engines: counts what runs, and queues what comes while no engine may take it.

While an engine is changed and no other takes requests, those that come wait, in arrival order, and none of them sees
more than one version. The queue and the wait are bounded: whatever a client can grow has a limit. The server's own
requests have a place beside all this, behind every request. Knows nothing of HTTP, of versions, or of why an engine is
changed.

One event loop, no locks: every change of state happens between two awaits.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import ClassVar

from svc.errors import SvcError

OVERLOADED_RETRY_S = 1
"""Running requests end all the time."""
QUEUED_RETRY_S = 2
"""A swap in place takes one to two seconds once the running requests are done."""
ENGINE_RETRY_S = 20
"""An engine start takes about 40 s; an OpenAI client that retries twice spans it."""
_ENDED_POLL_S = 0.05


class AdmissionError(SvcError):
    """A request that the engine never saw: the client may send it again.

    Attributes:
        retry_after_s: what the client is told to wait, seconds; below 120, because OpenAI clients ignore more.
    """

    retry_after_s: int = QUEUED_RETRY_S


class OverloadedError(AdmissionError):
    """As many requests run as may run, or they may make as many tokens as may be made."""

    retry_after_s = OVERLOADED_RETRY_S


class TooManyTokensError(SvcError):
    """A request that asks for more than may run at all."""


class QueueOverflowError(AdmissionError):
    """The queue is full."""


class QueueTimeoutError(AdmissionError):
    """A queued request waited as long as it may."""


class EngineUnavailableError(AdmissionError):
    """There is no engine to run the request: it is starting, or it failed."""

    retry_after_s = ENGINE_RETRY_S


class BackgroundSlotEndedError(Exception):
    """The server's own request was cut off, for a swap or because the engine is gone; it may be asked again."""


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """One that waits.

    Attributes:
        given: settled when it gets its place, or none.
        tokens: that its answers may have.
    """

    given: asyncio.Future[None]
    tokens: int


class Admission:
    """Who may run in the engine, who waits, and who is sent away.

    Three facts decide: whether an engine takes requests, whether one is being changed (a swap), and whether all places
    or all tokens are taken: a request counts by what its answers may take, since one can ask for hundreds. Where no
    engine takes requests, admission is closed while one is being changed, whatever becomes of it: a swap that has to
    restart the engine keeps the requests that it queued. Otherwise they are refused. Starts with no engine.

    Args:
        max_running: requests in the engine at once.
        max_tokens: that their answers may have together.
        max_queued: requests that wait while admission is closed.
        queue_timeout_s: longest wait of one request, seconds.
        wake_timeout_s: the same for an engine that was ended because nobody asked, seconds.
    """

    _STARTING: ClassVar[str] = "the engine is starting"

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
        self._max_queued = max_queued
        self._queue_timeout_s = queue_timeout_s
        self._wake_timeout_s = wake_timeout_s or queue_timeout_s
        self._asleep = False
        self._last_ended_at = time.monotonic()
        self._running = self._tokens = 0
        self._most_queued = 0
        self._waiting: deque[_Place] = deque()
        self._changing = False
        self._ready = False
        self._unavailable: str | None = self._STARTING
        self._closed_at: float | None = None
        self._closed_s: float | None = None
        self._background_slot: asyncio.Timeout | None = None
        self._open, self._quiet, self._wanted = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._show()

    @property
    def running(self) -> int:
        """Requests in the engine."""
        return self._running

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def most_queued(self) -> int:
        """Most requests that waited at once, since a change began last."""
        return self._most_queued

    @property
    def closed_s(self) -> float | None:
        """How long admission was closed in the last change, seconds; None where it never was."""
        return self._closed_s

    @property
    def _closed(self) -> bool:
        return (self._changing or self._asleep) and not self._ready

    @property
    def idle_s(self) -> float:
        """How long no request has run or waited, seconds."""
        return 0.0 if self._running or self._waiting else time.monotonic() - self._last_ended_at

    @property
    def unavailable_reason(self) -> str | None:
        """Why there is no engine; None when there is one, also where it is being changed or comes when it is asked."""
        return None if self._asleep else self._unavailable

    @asynccontextmanager
    async def admit(self, tokens: int = 1) -> AsyncIterator[None]:
        """Waits for a place in the engine and holds it for the body.

        Args:
            tokens: most that the answers may have.

        Raises:
            TooManyTokensError: more than may ever run.
            EngineUnavailableError, OverloadedError, QueueOverflowError: refused at once.
            QueueTimeoutError: refused after `queue_timeout_s`.
        """
        if tokens > self._max_tokens:
            raise TooManyTokensError(
                f"the answers may take {tokens} tokens",
                expected=f"at most {self._max_tokens} in one request: a smaller 'n' or 'max_tokens'",
            )
        if self._closed:
            await self._wait(tokens)
        else:
            self._enter(tokens)
        try:
            yield
        finally:
            self._leave(tokens)

    async def ended(self) -> None:
        """Returns when no request runs or waits. Of use only where none comes any more."""
        while self._running or self._waiting:
            await asyncio.sleep(_ENDED_POLL_S)

    @asynccontextmanager
    async def background_slot(self, patience_s: float) -> AsyncIterator[None]:
        """Waits for a moment without requests, and holds a place beside them for a request of the server's own.

        It is none of `running`, and no request waits for it. It is given while admission is open and there is an
        engine; when that ends, the body is cut off: a swap does not wait for its answer, which could take longer than
        the swap may.

        Args:
            patience_s: after so long without such a moment it goes beside the requests that run.

        Raises:
            BackgroundSlotEndedError: the body was cut off.
            RuntimeError: somebody has the place; requests of its own come one at a time.
        """
        await self._wait_for_quiet(patience_s)
        if self._background_slot is not None:
            raise RuntimeError("a background request runs already")
        try:
            async with asyncio.timeout(None) as self._background_slot:
                self._show()
                yield
        except TimeoutError as error:
            if self._background_slot is None or not self._background_slot.expired():
                raise
            raise BackgroundSlotEndedError from error
        finally:
            self._background_slot = None
            self._show()

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """An engine is changed in the body: requests that no engine takes meanwhile are queued and not refused.

        Raises:
            RuntimeError: one is being changed already; swaps come one at a time.
        """
        if self._changing:
            raise RuntimeError("an engine is being changed already")
        self._changing, self._most_queued, self._closed_s = True, 0, None
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

    async def wanted(self) -> None:
        """Returns when a request waits."""
        await _until(self._wanted)

    def end_background_slot(self) -> None:
        """Cuts the server's own request off, if one runs: its engine is about to be changed."""
        if self._background_slot is not None and not self._background_slot.expired():
            self._background_slot.reschedule(asyncio.get_running_loop().time())

    def unavailable(self, reason: str | None) -> None:
        """No engine takes requests from now on: new ones are refused at once, or queued while one is being changed.

        Args:
            reason: shown to clients, as "the engine is starting"; no paths. None of an engine that is being changed:
                it was well, and is to be again.
        """
        self._ready, self._unavailable = False, reason or self._unavailable
        self.end_background_slot()
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
            self._closed_s = (self._closed_s or 0.0) + now - self._closed_at
            self._closed_at = None
        self._admit_waiting()
        self._show()

    def _enter(self, tokens: int) -> None:
        if not self._ready:
            raise _no_engine(self._unavailable)
        if not self._fits(tokens):
            raise OverloadedError(
                f"{self._running} requests are running, which may make {self._tokens} tokens; at most "
                f"{self._max_running} and {self._max_tokens} may at once",
                todo="send the request again later",
            )
        self._take_place(tokens)

    def _fits(self, tokens: int) -> bool:
        return self._running < self._max_running and self._tokens + tokens <= self._max_tokens

    def _take_place(self, tokens: int) -> None:
        self._running += 1
        self._tokens += tokens
        self._show()

    def _leave(self, tokens: int) -> None:
        self._running -= 1
        self._tokens -= tokens
        self._last_ended_at = time.monotonic()
        self._admit_waiting()
        self._show()

    def _show(self) -> None:
        """Shows what has changed to those who wait for it."""
        _set(self._open, self._ready)
        _set(self._quiet, self._ready and not self._running)
        _set(self._wanted, bool(self._waiting))

    async def _wait_for_quiet(self, patience_s: float) -> None:
        """Returns when admission is open and no request runs, or after `patience_s` when it is open."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await _until(self._quiet)
        await _until(self._open)

    async def _wait(self, tokens: int) -> None:
        """Returns with a place taken."""
        if len(self._waiting) >= self._max_queued:
            raise QueueOverflowError(
                f"{len(self._waiting)} requests wait for an engine, as many as may wait",
                todo="send the request again in a moment",
            )
        loop = asyncio.get_running_loop()
        place = _Place(loop.create_future(), tokens)
        self._waiting.append(place)
        self._show()
        self._most_queued = max(self._most_queued, len(self._waiting))
        # The timer settles the future itself: with asyncio.timeout a place given in the same tick would be lost.
        timeout_s = self._wake_timeout_s if self._asleep else self._queue_timeout_s
        timer = loop.call_later(timeout_s, self._expire, place, timeout_s)
        try:
            await place.given
        except asyncio.CancelledError:
            if place.given.cancelled():
                self._waiting.remove(place)
                self._show()
            elif place.given.exception() is None:
                self._leave(tokens)
            raise
        finally:
            timer.cancel()

    def _expire(self, place: "_Place", after_s: float) -> None:
        if not place.given.done():
            self._waiting.remove(place)
            self._show()
            error = QueueTimeoutError(f"waited {after_s:g} s for an engine", todo="send the request again")
            place.given.set_exception(error)

    def _admit_waiting(self) -> None:
        """Gives free places to the requests that came first; with no engine, sends all away.

        A cancelled future stays in the queue until its own task removes it, in the same turn of the loop.
        """
        if self._closed:
            return
        for place in [place for place in self._waiting if not place.given.done()]:
            if not self._ready:
                place.given.set_exception(_no_engine(self._unavailable))
            elif self._fits(place.tokens):
                self._take_place(place.tokens)
                place.given.set_result(None)
            else:
                return
            self._waiting.remove(place)


def _set(event: asyncio.Event, value: bool) -> None:
    if value:
        event.set()
    else:
        event.clear()


async def _until(event: asyncio.Event) -> None:
    """Until the event is set, and still is when the waiter's turn comes."""
    while not event.is_set():
        await event.wait()


def _no_engine(reason: str | None) -> EngineUnavailableError:
    return EngineUnavailableError(reason or "the engine is being changed", todo="send the request again later")
