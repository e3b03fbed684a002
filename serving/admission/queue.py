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
import heapq
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import attrgetter

from serving.admission.errors import AdmissionError, QueueOverflowError, QueueTimeoutError
from serving.admission.events import set_event, until_set
from serving.admission.party import Party

_STALE = 64
"""So many turns of who has left are kept beside those that count."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One that waits.

    Attributes:
        party: whose request it is.
        tokens: that its answers may have.
        number: in arrival order.
        joined_at: when it came, by the event loop's clock, seconds.
        given: settled when it gets its place, or none.
    """

    party: Party
    tokens: int
    number: int
    joined_at: float
    given: asyncio.Future[None]


@dataclass(slots=True, eq=False)
class _Line:
    """Those of one party that wait, in arrival order.

    Attributes:
        turn: its entry among the turns of all lines; None where it has none.
    """

    party: Party
    waiting: deque[Place] = field(default_factory=deque)
    turn: "_Turn | None" = None

    @property
    def head(self) -> Place | None:
        """The first; a cancelled one stays until its own task removes it, in the same turn of the loop."""
        return next((place for place in self.waiting if not place.given.done()), None)

    @property
    def load(self) -> float:
        """How many wait, for its weight."""
        return len(self.waiting) / self.party.weight


_Turn = tuple[float, int, _Line]
"""When a line is next in the times of the parties; of two at once the one whose request came first."""


class RequestQueue:
    """Those that wait.

    Args:
        max_queued: most at once.

    Attributes:
        most: most that waited at once, since it was set back.
    """

    def __init__(self, *, max_queued: int) -> None:
        self._max_queued = max_queued
        self._lines: dict[str, _Line] = {}
        self._times: dict[str, float] = {}  # of each party, when its next request begins
        self._turns: list[_Turn] = []  # a heap; one that is not its line's any more means nothing
        self._now = 0.0  # when the last one that was given a place began
        self._arrived = self._queued = 0
        self._wanted = asyncio.Event()
        self.most = 0

    def __len__(self) -> int:
        return self._queued

    async def wanted(self) -> None:
        """Returns when a request waits."""
        await until_set(self._wanted)

    def charge(self, party: Party, tokens: int) -> None:
        """A request of a party got a place; also one that did not wait for it."""
        self._now = max(self._now, self._times.get(party.name, 0.0))
        self._times[party.name] = self._now + tokens / party.weight
        if line := self._lines.get(party.name):
            self._line_up(line)

    def join(self, party: Party, tokens: int) -> Place:
        """A request waits from now on; to be followed by `until_given`.

        Args:
            tokens: that its answers may have.

        Raises:
            QueueOverflowError: as many wait as may.
        """
        if self._queued >= self._max_queued:
            self._make_room(party)
        self._arrived += 1
        loop = asyncio.get_running_loop()
        place = Place(party, tokens, self._arrived, loop.time(), loop.create_future())
        line = self._lines.get(party.name)
        if line is None:
            line = self._lines[party.name] = _Line(party)
            self._times[party.name] = max(self._now, self._times.get(party.name, 0.0))
        line.party = party  # its weight may have changed
        line.waiting.append(place)
        if line.turn is None:
            self._line_up(line)
        self._count_one_more()
        return place

    def rejoin(self, place: Place) -> Place:
        """Queue a request again that could not use the place that it was given; to be followed by `until_given`.

        The request keeps its turn and its time in the queue, its party is not charged for the unused place, and the
        request is queued even where the queue is full.
        """
        again = replace(place, given=asyncio.get_running_loop().create_future())
        self._times[place.party.name] -= place.tokens / place.party.weight
        line = self._lines.setdefault(place.party.name, _Line(place.party))
        insort(line.waiting, again, key=attrgetter("number"))
        self._line_up(line)
        self._count_one_more()
        return again

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
        while place := self._next():
            self._refuse(place, error())

    def _line_up(self, line: _Line) -> None:
        line.turn = self._times[line.party.name], line.waiting[0].number, line
        heapq.heappush(self._turns, line.turn)
        if len(self._turns) > 2 * len(self._lines) + _STALE:
            self._turns = [each.turn for each in self._lines.values() if each.turn]
            heapq.heapify(self._turns)

    def _next(self) -> Place | None:
        while self._turns:
            turn = self._turns[0]
            line = turn[2]
            if line.turn is turn:
                if head := line.head:
                    return head
                line.turn = None  # all of them were cancelled, and have not gone yet
            heapq.heappop(self._turns)
        return None

    def _make_room(self, party: Party) -> None:
        """Raises where no other party has more in the queue than this one would have, each for its weight."""
        overflow = QueueOverflowError(
            f"{self._queued} requests wait for an engine, as many as may wait",
            todo="send the request again in a moment",
        )
        line = self._lines.get(party.name)
        load = ((len(line.waiting) if line else 0) + 1) / party.weight
        longest = max(self._lines.values(), key=lambda each: each.load, default=None)
        if longest is None or longest.load <= load:
            raise overflow
        newest = next((place for place in reversed(longest.waiting) if not place.given.done()), None)
        if newest is None:
            raise overflow
        self._refuse(newest, overflow)

    def _refuse(self, place: Place, error: AdmissionError) -> None:
        place.given.set_exception(error)
        self._remove(place)

    def _expire(self, place: Place, after_s: float) -> None:
        if not place.given.done():
            self._refuse(place, QueueTimeoutError(f"waited {after_s:g} s for an engine", todo="send the request again"))

    def _count_one_more(self) -> None:
        self._queued += 1
        self._show()
        self.most = max(self.most, self._queued)

    def _remove(self, place: Place) -> None:
        line = self._lines[place.party.name]
        line.waiting.remove(place)
        if not line.waiting:
            line.turn = None
            del self._lines[place.party.name]
        self._queued -= 1
        self._show()

    def _show(self) -> None:
        set_event(self._wanted, bool(self._queued))
