"""Requests that wait for a place, in arrival order, bounded in number and time. Who gets one, admission decides."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from serving.admission.errors import AdmissionError, QueueOverflowError, QueueTimeoutError
from serving.admission.events import set_event, until_set


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """One that waits.

    Attributes:
        given: settled when it gets its place, or none.
        tokens: that its answers may have.
    """

    given: asyncio.Future[None]
    tokens: int


class RequestQueue:
    """Those that wait.

    Args:
        max_queued: most at once.

    Attributes:
        most: most that waited at once, since it was set back to 0.
    """

    def __init__(self, *, max_queued: int) -> None:
        self._max_queued = max_queued
        self._waiting: deque[_Place] = deque()
        self._wanted = asyncio.Event()
        self.most = 0

    def __len__(self) -> int:
        return len(self._waiting)

    async def wanted(self) -> None:
        """Returns when a request waits."""
        await until_set(self._wanted)

    async def wait(self, tokens: int, timeout_s: float, give_back: Callable[[], None]) -> None:
        """Returns when the request was given a place.

        Args:
            tokens: that its answers may have.
            give_back: for one that was given in the moment in which the request was cancelled.

        Raises:
            QueueOverflowError: as many wait as may.
            QueueTimeoutError: after `timeout_s`.
            AdmissionError: it was sent away.
        """
        if len(self._waiting) >= self._max_queued:
            raise QueueOverflowError(
                f"{len(self._waiting)} requests wait for an engine, as many as may wait",
                todo="send the request again in a moment",
            )
        loop = asyncio.get_running_loop()
        place = _Place(loop.create_future(), tokens)
        self._waiting.append(place)
        self._show()
        self.most = max(self.most, len(self._waiting))
        # The timer settles the future itself: with asyncio.timeout a place given in the same tick would be lost.
        timer = loop.call_later(timeout_s, self._expire, place, timeout_s)
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
        """Gives places to the requests that came first, for as long as there are any.

        Args:
            take: takes a place for so many tokens; False where there is none.
        """
        for place in self._unsettled():
            if not take(place.tokens):
                return
            place.given.set_result(None)
            self._remove(place)

    def send_away(self, error: Callable[[], AdmissionError]) -> None:
        """Refuses all that wait."""
        for place in self._unsettled():
            place.given.set_exception(error())
            self._remove(place)

    def _unsettled(self) -> list[_Place]:
        """A cancelled future stays in the queue until its own task removes it, in the same turn of the loop."""
        return [place for place in self._waiting if not place.given.done()]

    def _expire(self, place: _Place, after_s: float) -> None:
        if not place.given.done():
            self._remove(place)
            error = QueueTimeoutError(f"waited {after_s:g} s for an engine", todo="send the request again")
            place.given.set_exception(error)

    def _remove(self, place: _Place) -> None:
        self._waiting.remove(place)
        self._show()

    def _show(self) -> None:
        set_event(self._wanted, bool(self._waiting))
