"""Admission control between HTTP and the engines: counts running requests and queues those that have to wait.

While an engine is being replaced or reloaded and no other engine accepts requests, new requests wait, and each is
answered by a single version. When all slots are taken, requests with an API key wait too. A request without an API key
is queued if other requests are already waiting, and rejected if none are. Slots that become free are shared among the
waiting requests according to the weights of their keys; all requests without a key count as one key. The queue length
and the waiting time are bounded, because clients could otherwise increase them without limit. The server's own requests
have a separate slot and yield to every other request. Batch requests also have separate slots, and use only the
capacity that client requests leave free. This module knows nothing about HTTP, versions, or the reason why an engine is
replaced or reloaded.

All methods run on one event loop and never await in the middle of a state change, so no locks are needed.

Batch requests do not count toward the limit on running client requests, so no client waits for them. They wait in
arrival order while there is no spare capacity. When clients need the capacity, or the engine is being replaced, running
batch requests are interrupted, newest first. An interrupted request may be sent again.

`serving.admission.admission` decides when there is spare capacity.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from serving.admission.background_slot import BackgroundSlot
from serving.admission.errors import (
    EngineUnavailableError,
    OverloadedError,
    QueueOverflowError,
    QueueTimeoutError,
    TooManyTokensError,
)
from serving.admission.queue import RequestQueue
from serving.admission.tenant import NO_KEY, Tenant
from serving.one_shot_event import OneShotEvent

_ENDED_POLL_S = 0.05
_FREE_SHARE = 4
"""Batch requests leave 1/_FREE_SHARE of the capacity free, so that they rarely have to be interrupted for client
requests."""
MAX_WAIT_S = 60.0
"""Maximum time that a batch request waits for a slot, in seconds. After this time it is rejected, and its batch sends
it again, so that its key's permissions are checked again.
"""


class InterruptedRequestError(OverloadedError):
    """Raised when a batch request is interrupted, because clients need its capacity or its engine is being replaced."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A request that waits for a slot.

    Attributes:
        given: future that is done when the request gets its slot, or has waited too long.
    """

    tokens: int
    interruption: OneShotEvent
    given: asyncio.Future[None]


class BatchSlots:
    """One model's slots for batch requests.

    Args:
        most: maximum number of requests that run concurrently.

    Attributes:
        tokens: maximum total number of tokens in the answers of all running requests.
    """

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._waiting: deque[_Waiting] = deque()
        self._running: dict[OneShotEvent, int] = {}  # tokens of each, in the order in which they began
        self.tokens = 0

    @property
    def running(self) -> int:
        """Number of running requests, excluding interrupted ones."""
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._running or self._waiting)

    @property
    def wanted(self) -> bool:
        """Whether any request is waiting for a slot."""
        return bool(self._waiting)

    async def enter(self, tokens: int, interruption: OneShotEvent, fits: Callable[[int], bool]) -> None:
        """Wait for a slot and take it. The slot is held until `leave` is called.

        Args:
            tokens: maximum number of tokens in the answers.
            interruption: event that `interrupt` triggers if the request must give up its slot.
            fits: see `give`.

        Raises:
            QueueTimeoutError: no slot became free within `MAX_WAIT_S`.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(tokens, interruption, loop.create_future())
        self._waiting.append(waiting)
        self.give(fits)
        timer = loop.call_later(MAX_WAIT_S, self._expire, waiting)
        try:
            await waiting.given
        except (asyncio.CancelledError, QueueTimeoutError):
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            self.leave(interruption)  # it may have been cancelled just as it got its slot
            self.give(fits)  # the next request may fit where this one did not
            raise
        finally:
            timer.cancel()

    def leave(self, interruption: OneShotEvent) -> None:
        """Release a request's slot, unless the request was interrupted and has already lost it."""
        self.tokens -= self._running.pop(interruption, 0)

    def give(self, fits: Callable[[int], bool]) -> None:
        """Give slots to waiting requests in order.

        Args:
            fits: function that returns whether there is spare capacity for one more request with the given number of
                tokens.
        """
        while self._waiting and len(self._running) < self._most:
            waiting = next((each for each in self._waiting if not each.given.done()), None)
            if waiting is None or not fits(waiting.tokens):
                return
            self._waiting.remove(waiting)
            self._running[waiting.interruption] = waiting.tokens
            self.tokens += waiting.tokens
            waiting.given.set_result(None)

    def interrupt(self, excess: Callable[[], bool]) -> None:
        """Interrupt requests, newest first, as long as `excess` returns True."""
        while self._running and excess():
            interruption, tokens = self._running.popitem()
            self.tokens -= tokens
            interruption.end(InterruptedRequestError("the request was interrupted", todo="retry the request"))

    def _expire(self, waiting: _Waiting) -> None:
        if not waiting.given.done():
            waiting.given.set_exception(QueueTimeoutError(f"no capacity became available within {MAX_WAIT_S:g} s"))


@dataclass(eq=False, kw_only=True)
class Admission:
    """Decides which requests run in the engine, are queued or are rejected.

    The decision depends on whether an engine accepts requests, whether a swap is replacing or reloading an engine, and
    whether the maximum number of requests or tokens is reached. Each request is counted with its maximum number of
    tokens, because a single request can ask for hundreds of answers. If no engine accepts requests during a swap,
    admission is closed and requests are queued, even if the swap restarts the engine. Outside a swap, they are
    rejected. Initially, there is no engine.

    Attributes:
        max_running: maximum number of requests in the engine.
        max_tokens: maximum total number of tokens in the answers of all running requests.
        max_queued: maximum number of queued requests.
        queue_timeout_s: maximum time a request may wait in the queue, in seconds.
        wake_timeout_s: maximum wait for an engine that was stopped because it was idle, in seconds.
        max_batched: maximum number of batch requests in the engine.
        capacity: number of requests that the engines answer concurrently; `max_running` if None.
        running: number of requests in the engine.
        closed_s: time for which admission was closed during the last swap, in seconds, or None if it stayed open.
        queue: the queued requests.
        background_slot: the slot for the server's own requests.
        batch_slots: the slots for batch requests.
    """

    max_running: int
    max_tokens: int
    max_queued: int
    queue_timeout_s: float
    wake_timeout_s: float | None = None
    max_batched: int = 16
    capacity: int | None = None

    def __post_init__(self) -> None:
        self._wake_timeout_s = self.wake_timeout_s or self.queue_timeout_s
        self._asleep = False
        self._idle_since = time.monotonic()
        self.running = self._tokens = self._preparing = 0
        self._changing = False
        self._ready = False
        self._unavailable: str | None = "the engine is starting"
        self._closed_at: float | None = None
        self.closed_s: float | None = None
        self.queue = RequestQueue(max_queued=self.max_queued)
        self.background_slot = BackgroundSlot()
        self.batch_slots = BatchSlots(most=self.max_batched)
        self._capacity = min(self.max_running, self.capacity or self.max_running)

    @property
    def queued(self) -> int:
        """Number of requests waiting for a slot or for an adapter."""
        return len(self.queue) + self._preparing

    @property
    def _closed(self) -> bool:
        return (self._changing or self._asleep) and not self._ready

    @property
    def idle_s(self) -> float:
        """Seconds since a request last ran or waited, or since an engine became ready; 0 while any request is running
        or waiting.
        """
        return 0.0 if self.running or self.queue or self._preparing else time.monotonic() - self._idle_since

    @property
    def unavailable_reason(self) -> str | None:
        """Reason why no engine is available. None if an engine is running, is being replaced or reloaded, or will be
        started for the next request.
        """
        return None if self._asleep else self._unavailable

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Count a request as waiting before it takes a slot, so that the model is not considered idle."""
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1
            self._idle_since = time.monotonic()

    async def enter(self, tokens: int, tenant: Tenant, *, may_wait: bool = False) -> None:
        """Take a slot, waiting until a slot is free if necessary. The slot is held until `leave` is called.

        Args:
            tokens: maximum number of tokens in the answers, which is the cost of the slot.
            tenant: the tenant that sent the request. If it has an `interruption`, the request is a batch request and
                waits for spare capacity.
            may_wait: whether the request may be queued even without an API key, because it has already waited for an
                adapter.

        Raises:
            TooManyTokensError: the request alone needs more tokens than the limit for all running requests.
            EngineUnavailableError: there is no engine.
            QueueOverflowError, QueueTimeoutError: admission is closed, and the queue is full or the request has waited
                too long.
            OverloadedError: all slots are taken, and the request may not wait or has waited too long.
        """
        if tokens > self.max_tokens:
            raise TooManyTokensError(
                f"the answers to this request could reach {tokens} tokens in total",
                expected=f"at most {self.max_tokens} tokens per request; reduce 'n' or 'max_tokens'",
            )
        if tenant.interruption is not None:
            await self.batch_slots.enter(tokens, tenant.interruption, self._has_spare)
        elif self._closed or not self._enter(tokens, tenant, may_wait or tenant.has_key):
            await self._wait(tokens, tenant)

    async def opened(self, tenant: Tenant) -> None:
        """Wait in the queue, without taking a slot, while admission is closed because an engine is being replaced or
        reloaded.

        A sleeping engine is not woken.

        Raises:
            EngineUnavailableError, QueueOverflowError, QueueTimeoutError: see `enter`.
        """
        self._idle_since = time.monotonic()
        if self._changing and not self._ready:
            await self._wait(0, tenant)
            self.leave(0)

    def set_capacity(self, capacity: int) -> None:
        """Set the number of requests that the engines answer concurrently."""
        self._capacity = min(self.max_running, capacity)

    async def ended(self) -> None:
        """Wait until no request is running or waiting. Call this only after new requests have stopped arriving."""
        while self.running or self.queue or self._preparing:
            await asyncio.sleep(_ENDED_POLL_S)

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Context manager for a swap: while no engine accepts requests, they are queued instead of rejected.

        Raises:
            RuntimeError: another engine change is already in progress; swaps run one at a time.
        """
        if self._changing:
            raise RuntimeError("another engine change is already in progress")
        self._changing, self.queue.most, self.closed_s = True, len(self.queue), None
        self._settle()
        try:
            yield
        finally:
            self._changing = False
            self._settle()

    def sleep(self) -> None:
        """Mark the model as asleep. While no engine accepts requests, they are queued for up to `wake_timeout_s`.

        The first queued request starts an engine.
        """
        self._asleep = True
        self._settle()

    def wake(self) -> None:
        """Mark the model as awake. New and queued requests no longer wait for a sleeping model to wake.

        If no engine accepts requests, they are rejected, unless an engine is being changed.
        """
        self._asleep = False
        self._settle()

    def unavailable(self, reason: str | None) -> None:
        """Record that no engine accepts requests, and cancel the server's own request to the engine, if one is running.

        Queued and new requests are rejected, unless admission is closed, in which case they wait.

        Args:
            reason: message for clients, such as "the engine is starting". It must not contain paths. None if the engine
                is being replaced or reloaded.
        """
        self._ready, self._unavailable = False, reason or self._unavailable
        self.background_slot.end()
        self._settle()

    def available(self) -> None:
        """Record that an engine accepts requests. If the model had no such engine before, its idle time starts now."""
        if not self._ready:
            self._idle_since = time.monotonic()
        self._ready, self._unavailable = True, None
        self._settle()

    def _settle(self) -> None:
        """Update the queued requests, the background slot and `closed_s` after a state change."""
        now = time.monotonic()
        if self._closed and self._closed_at is None:
            self._closed_at = now
        elif not self._closed and self._closed_at is not None:
            self.closed_s = (self.closed_s or 0.0) + now - self._closed_at
            self._closed_at = None
        self._admit_waiting()
        self._show()

    def _enter(self, tokens: int, tenant: Tenant, may_wait: bool) -> bool:
        """Take a slot and return True. Return False if the request must be queued, and raise if it is rejected."""
        if not self._ready:
            raise self._no_engine()
        if self.queue:
            return False
        if self._take_place(tokens):
            self.queue.charge(tenant, tokens)
            return True
        if may_wait:
            return False
        raise OverloadedError(f"the server is at capacity: {self._full}", todo="retry the request later")

    def _no_engine(self) -> EngineUnavailableError:
        return EngineUnavailableError(
            self._unavailable or "the engine is being changed", todo="retry the request later"
        )

    @property
    def _full(self) -> str:
        return (
            f"{self.running} requests with up to {self._tokens} tokens to generate are running; the limits are "
            f"{self.max_running} requests and {self.max_tokens} tokens"
        )

    def _take_place(self, tokens: int) -> bool:
        """Take a slot, or return False if no slot is free."""
        if self.running >= self.max_running or self._tokens + tokens > self.max_tokens:
            return False
        self.running += 1
        self._tokens += tokens
        self._show()
        return True

    def leave(self, tokens: int, tenant: Tenant = NO_KEY) -> None:
        """Release a request's slot, and give free slots to queued requests.

        Args:
            tokens: number of tokens that was passed when the slot was taken.
        """
        if tenant.interruption is not None:
            self.batch_slots.leave(tenant.interruption)
            self._show()
            return
        self.running -= 1
        self._tokens -= tokens
        self._idle_since = time.monotonic()
        if self.queue:
            self._admit_waiting()
        self._show()

    async def _wait(self, tokens: int, tenant: Tenant) -> None:
        """Queue the request and wait until it gets a slot."""
        timeout_s, closed = self._wake_timeout_s if self._asleep else self.queue_timeout_s, self._closed
        try:
            place = self.queue.join(tenant, tokens)
            self._admit_waiting()  # it may be its turn now: it may fit where the previous head of the queue does not
            await self.queue.until_given(place, timeout_s, lambda: self.leave(tokens))
            while self._closed:  # a change began after the slot was given, and before this task ran again
                closed = True
                self.leave(tokens)
                place = self.queue.rejoin(place)
                await self.queue.until_given(place, timeout_s, lambda: self.leave(tokens))
        except (QueueOverflowError, QueueTimeoutError) as error:
            if closed:
                raise
            raise OverloadedError(f"{error.wrong}; {self._full}", todo=error.todo) from error
        finally:
            self._settle()  # if the request has left the queue without a slot, the next one may fit

    def _admit_waiting(self) -> None:
        """Give free slots to the queued requests in order. If there is no engine, reject all of them."""
        if self._closed:
            return
        if self._ready:
            self.queue.give(self._take_place)
        else:
            self.queue.reject_all(self._no_engine)

    def _show(self) -> None:
        self.background_slot.show(open=self._ready, running=self.running)
        if self.batch_slots.busy:
            self.batch_slots.interrupt(self._has_excess)
            self.batch_slots.give(self._has_spare)

    def _has_spare(self, tokens: int) -> bool:
        """Return whether there is spare capacity for another batch request."""
        if not self._ready or self._changing or self.queue:
            return False
        most = self._capacity - self._capacity // _FREE_SHARE
        tokens += self._tokens + self.batch_slots.tokens
        return self.running + self.batch_slots.running < most and tokens <= self.max_tokens

    def _has_excess(self) -> bool:
        """Return whether a batch request must be interrupted, because clients need its capacity or an engine is being
        replaced.
        """
        if not self._ready or self._changing:
            return True
        tokens = self._tokens + self.batch_slots.tokens
        return self.running + self.batch_slots.running > self._capacity or tokens > self.max_tokens
