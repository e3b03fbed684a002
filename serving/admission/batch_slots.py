"""Slots for batch requests, which use the capacity that client requests leave free.

Batch requests do not count toward the limit on running client requests, so no client waits for them. They wait in
arrival order while there is no spare capacity. When clients need the capacity, or the engine is being replaced, running
batch requests are interrupted, newest first. An interrupted request may be sent again.

`serving.admission.admission` decides when there is spare capacity.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from serving.admission.errors import OverloadedError, QueueTimeoutError
from serving.one_shot_event import OneShotEvent

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
