"""A queue of requests waiting for a slot. It is bounded in size and time, and shared fairly between tenants.

The queue uses start-time fair queueing (Goyal, Vin and Cheng, 1996). Each tenant has a virtual time, which advances by
the cost of its requests divided by its weight. The tenant with the earliest virtual time is next, and its own requests
run in arrival order. A tenant that was idle starts at the virtual time of the other tenants, so idling earns no credit.
Waiting tenants therefore share slots in proportion to their weights, regardless of what their requests cost, and a
tenant with few requests waits for at most one request from each other tenant.

The first request in the queue keeps its turn until there is capacity for it, because otherwise smaller requests could
overtake it forever. When the queue is full, a request from a tenant with fewer waiting requests replaces the newest
request from the tenant with the most. Both counts are relative to the tenants' weights.
"""

import asyncio
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter

from serving.admission.errors import AdmissionError, QueueOverflowError, QueueTimeoutError
from serving.admission.tenant import Tenant


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A queued request.

    Attributes:
        tenant: the tenant that sent the request.
        tokens: maximum number of tokens in the request's answers.
        number: position in arrival order.
        joined_at: arrival time by the event loop's clock, in seconds.
        given: future that is done when the request gets its slot or is rejected. If the request is cancelled, its task
            removes the entry from the queue in the same iteration of the event loop.
    """

    tenant: Tenant
    tokens: int
    number: int
    joined_at: float
    given: asyncio.Future[None]


class RequestQueue:
    """The queued requests of all tenants.

    Args:
        max_queued: maximum number of queued requests.

    Attributes:
        most: peak number of queued requests since this value was last reset.
    """

    def __init__(self, *, max_queued: int) -> None:
        self._max_queued = max_queued
        self._waiting: dict[str, deque[Place]] = {}  # by tenant, in arrival order
        self._times: dict[str, float] = {}  # by tenant, virtual start time of its next request
        self._now = 0.0  # virtual start time of the last request that was given a slot
        self._arrived = self._queued = 0
        self._wanted = asyncio.Event()
        self.most = 0

    def __len__(self) -> int:
        return self._queued

    async def wanted(self) -> None:
        """Wait until at least one request is queued."""
        while not self._queued:
            await self._wanted.wait()

    def charge(self, tenant: Tenant, tokens: int) -> None:
        """Charge a tenant for a slot given to its request, by advancing its virtual time.

        This applies whether or not the request had to wait.
        """
        self._now = max(self._now, self._times.get(tenant.name, 0.0))
        self._times[tenant.name] = self._now + tokens / tenant.weight

    def join(self, tenant: Tenant, tokens: int) -> Place:
        """Add a request to the queue and return its entry. The caller must then call `until_given`.

        Args:
            tokens: maximum number of tokens in the request's answers.

        Raises:
            QueueOverflowError: the queue is full.
        """
        if self._queued >= self._max_queued:
            self._make_room(tenant)
        if tenant.name not in self._waiting:
            self._times[tenant.name] = max(self._now, self._times.get(tenant.name, 0.0))
        self._arrived += 1
        loop = asyncio.get_running_loop()
        return self._add(Place(tenant, tokens, self._arrived, loop.time(), loop.create_future()))

    def rejoin(self, place: Place) -> Place:
        """Put a request that could not use its slot back into the queue, and return its new entry.

        The request keeps its turn and its time in the queue, and is queued even if the queue is full. Its tenant
        is not charged for the unused slot. The caller must then call `until_given`.
        """
        self._times[place.tenant.name] -= place.tokens / place.tenant.weight
        return self._add(replace(place, given=asyncio.get_running_loop().create_future()))

    async def until_given(self, place: Place, timeout_s: float, give_back: Callable[[], None]) -> None:
        """Wait until the request gets a slot.

        Args:
            give_back: called to release the slot if the request was cancelled just as it got the slot.

        Raises:
            QueueOverflowError: the queue is full, and the request was dropped in favor of another tenant's request.
            QueueTimeoutError: the request has waited for `timeout_s`.
            AdmissionError: the request was rejected.
        """
        # The timer settles the future itself: with asyncio.timeout a slot given in the same tick would be lost.
        timer = asyncio.get_running_loop().call_at(place.joined_at + timeout_s, self._expire, place, timeout_s)
        try:
            await place.given
        except asyncio.CancelledError:
            if place.given.cancelled():
                self._remove(place)
            elif place.given.exception() is None:
                give_back()
            raise
        finally:
            timer.cancel()

    def give(self, take: Callable[[int], bool]) -> None:
        """Give slots to the queued requests in order, as long as slots are free.

        Args:
            take: function that tries to take a slot for a request with the given number of tokens, and returns whether
                it succeeded.
        """
        while place := self._next():
            if not take(place.tokens):
                return
            place.given.set_result(None)
            self._remove(place)
            self.charge(place.tenant, place.tokens)

    def reject_all(self, error: Callable[[], AdmissionError]) -> None:
        """Reject all queued requests with the given error."""
        waiting = [place for line in self._waiting.values() for place in line if not place.given.done()]
        for place in waiting:
            self._refuse(place, error())

    def _next(self) -> Place | None:
        """Return the request to run next: the oldest request of the tenant with the earliest virtual time."""
        heads = [next((place for place in line if not place.given.done()), None) for line in self._waiting.values()]
        return min(filter(None, heads), key=lambda head: (self._times[head.tenant.name], head.number), default=None)

    def _make_room(self, tenant: Tenant) -> None:
        """Make room for a tenant's request by rejecting a request from the tenant with the longest queue.

        That tenant's newest request is rejected. Queue lengths are relative to the tenants' weights.

        Args:
            tenant: the tenant whose request needs room.

        Raises:
            QueueOverflowError: no other tenant's queue is longer than the queue of `tenant` would be with the new
                request.
        """
        overflow = QueueOverflowError(
            f"the queue is full: {self._queued} requests are waiting for an engine",
            todo="retry the request in a moment",
        )
        longest = max(self._waiting.values(), key=_load, default=deque[Place]())
        if not longest or _load(longest) <= (len(self._waiting.get(tenant.name, ())) + 1) / tenant.weight:
            raise overflow
        newest = next((place for place in reversed(longest) if not place.given.done()), None)
        if newest is None:
            raise overflow
        self._refuse(newest, overflow)

    def _refuse(self, place: Place, error: AdmissionError) -> None:
        place.given.set_exception(error)
        self._remove(place)

    def _expire(self, place: Place, after_s: float) -> None:
        if not place.given.done():
            self._refuse(
                place,
                QueueTimeoutError(f"timed out after waiting {after_s:g} s for an engine", todo="retry the request"),
            )

    def _add(self, place: Place) -> Place:
        insort(self._waiting.setdefault(place.tenant.name, deque()), place, key=attrgetter("number"))
        self._queued += 1
        self.most = max(self.most, self._queued)
        self._wanted.set()
        return place

    def _remove(self, place: Place) -> None:
        line = self._waiting[place.tenant.name]
        line.remove(place)
        if not line:
            del self._waiting[place.tenant.name]
        self._queued -= 1
        if not self._queued:
            self._wanted.clear()


def _load(line: deque[Place]) -> float:
    """Return a tenant's number of waiting requests divided by its weight.

    The weight is read from the newest request, because a tenant's weight may change.
    """
    return len(line) / line[-1].tenant.weight
