"""Requests that wait for a place, bounded in number and time. Who gets one next is fair between parties.

Start-time fair queueing (Goyal, Vin and Cheng, 1996). Each party has a time of its own, which goes on with what its
requests ask for, divided by its weight; the party whose time is earliest is next, and its own requests come in arrival
order. Who did not ask for a while begins at the time of the others: it has saved nothing, and owes nothing. So parties
that wait share by their weights, whatever their requests cost, and who asks for little comes after at most one request
of each other one.

The head of the queue keeps its turn where there is not yet room for it: else the small ones would pass it for ever.
Where the queue is full, the party with the most in it for its weight gives up its newest for one that has fewer.
"""

import asyncio
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter

from serving.admission.errors import AdmissionError, QueueOverflowError, QueueTimeoutError
from serving.admission.party import Party


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One that waits.

    Attributes:
        party: whose request it is.
        tokens: that its answers may have.
        number: in arrival order.
        joined_at: when it came, by the event loop's clock, seconds.
        given: settled when it gets its place, or none. A cancelled place stays in the queue until its own task removes
            it, in the same turn of the loop.
    """

    party: Party
    tokens: int
    number: int
    joined_at: float
    given: asyncio.Future[None]


class RequestQueue:
    """Those that wait.

    Args:
        max_queued: most at once.

    Attributes:
        most: most that waited at once, since it was set back.
    """

    def __init__(self, *, max_queued: int) -> None:
        self._max_queued = max_queued
        self._waiting: dict[str, deque[Place]] = {}  # of each party that waits, in arrival order
        self._times: dict[str, float] = {}  # of each party, when its next request begins
        self._now = 0.0  # when the last one that was given a place began
        self._arrived = self._queued = 0
        self._wanted = asyncio.Event()
        self.most = 0

    def __len__(self) -> int:
        return self._queued

    async def wanted(self) -> None:
        """Return when a request waits."""
        while not self._queued:
            await self._wanted.wait()

    def charge(self, party: Party, tokens: int) -> None:
        """A request of a party got a place; also one that did not wait for it."""
        self._now = max(self._now, self._times.get(party.name, 0.0))
        self._times[party.name] = self._now + tokens / party.weight

    def join(self, party: Party, tokens: int) -> Place:
        """A request waits from now on; to be followed by `until_given`.

        Args:
            tokens: that its answers may have.

        Raises:
            QueueOverflowError: as many wait as may.
        """
        if self._queued >= self._max_queued:
            self._make_room(party)
        if party.name not in self._waiting:
            self._times[party.name] = max(self._now, self._times.get(party.name, 0.0))
        self._arrived += 1
        loop = asyncio.get_running_loop()
        return self._add(Place(party, tokens, self._arrived, loop.time(), loop.create_future()))

    def rejoin(self, place: Place) -> Place:
        """Queue a request again that could not use the place that it was given; to be followed by `until_given`.

        The request keeps its turn and its time in the queue, its party is not charged for the unused place, and the
        request is queued even where the queue is full.
        """
        self._times[place.party.name] -= place.tokens / place.party.weight
        return self._add(replace(place, given=asyncio.get_running_loop().create_future()))

    async def until_given(self, place: Place, timeout_s: float, give_back: Callable[[], None]) -> None:
        """Returns when the request was given its place.

        Args:
            give_back: for a place that was given in the moment in which the request was cancelled.

        Raises:
            QueueOverflowError: it gave way to another party.
            QueueTimeoutError: `timeout_s` after it came.
            AdmissionError: it was sent away.
        """
        # The timer settles the future itself: with asyncio.timeout a place given in the same tick would be lost.
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
        """Gives places to those whose turn it is, for as long as there are any.

        Args:
            take: takes a place for so many tokens; False where there is none.
        """
        while place := self._next():
            if not take(place.tokens):
                return
            place.given.set_result(None)
            self._remove(place)
            self.charge(place.party, place.tokens)

    def send_away(self, error: Callable[[], AdmissionError]) -> None:
        """Refuses all that wait."""
        waiting = [place for line in self._waiting.values() for place in line if not place.given.done()]
        for place in waiting:
            self._refuse(place, error())

    def _next(self) -> Place | None:
        """Return the first place of the party whose time is earliest; of two parties, that of the older request."""
        heads = [next((place for place in line if not place.given.done()), None) for line in self._waiting.values()]
        return min(filter(None, heads), key=lambda head: (self._times[head.party.name], head.number), default=None)

    def _make_room(self, party: Party) -> None:
        """Refuse the newest request of the party with the most in the queue for its weight.

        Raises:
            QueueOverflowError: no other party has more in the queue than this one would have, each for its weight.
        """
        overflow = QueueOverflowError(
            f"{self._queued} requests wait for an engine, as many as may wait",
            todo="send the request again in a moment",
        )
        longest = max(self._waiting.values(), key=_load, default=deque[Place]())
        if not longest or _load(longest) <= (len(self._waiting.get(party.name, ())) + 1) / party.weight:
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
            self._refuse(place, QueueTimeoutError(f"waited {after_s:g} s for an engine", todo="send the request again"))

    def _add(self, place: Place) -> Place:
        insort(self._waiting.setdefault(place.party.name, deque()), place, key=attrgetter("number"))
        self._queued += 1
        self.most = max(self.most, self._queued)
        self._wanted.set()
        return place

    def _remove(self, place: Place) -> None:
        line = self._waiting[place.party.name]
        line.remove(place)
        if not line:
            del self._waiting[place.party.name]
        self._queued -= 1
        if not self._queued:
            self._wanted.clear()


def _load(line: deque[Place]) -> float:
    """Return how many requests of a party wait, for its weight, which may have changed since the older ones came."""
    return len(line) / line[-1].party.weight
