"""Limits how many invalid keys a peer may send per minute. The limit tolerates a few mistyped keys.

Valid keys are always accepted, even from a peer that has reached the limit. Otherwise, one client could lock out other
clients at the same address. This is safe because secrets are too long to be guessed.
"""

import math
import time
from collections.abc import Callable

from serving.http.peer import peer_of
from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import SvcError

MAX_INVALID_PER_MINUTE = 20
_MINUTE_S = 60.0
_MAX_PEERS = 4096
"""Maximum number of peers whose invalid keys are counted. When this number is exceeded, the peer whose one-minute
counting period began earliest is dropped."""


@answered_with(429, ErrorCode.TOO_MANY_WRONG_KEYS)
class TooManyWrongKeysError(SvcError):
    """Raised when a peer has sent too many invalid API keys in a minute.

    Args:
        retry_after_s: seconds until the peer's one-minute counting period ends.
    """

    def __init__(self, wrong: str, *, retry_after_s: int, todo: str) -> None:
        super().__init__(wrong, todo=todo)
        self.retry_after_s = retry_after_s


class FailedKeys:
    """Counts invalid keys per peer and minute. A peer's one-minute counting period begins with its first invalid key.

    Args:
        clock: function that returns monotonic time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._peers: dict[str, tuple[float, int]] = {}  # the oldest minute first

    def add(self, address: str) -> bool:
        """Count an invalid key, and return whether the peer has now used up its limit for this minute.

        Raises:
            TooManyWrongKeysError: the peer has exceeded the limit.
        """
        peer, now = peer_of(address), self._clock()
        began, count = self._peers.get(peer, (now, 0))
        if now - began >= _MINUTE_S:
            began, count = now, 0
        if count >= MAX_INVALID_PER_MINUTE:
            raise TooManyWrongKeysError(
                f"too many invalid API keys from this address: {MAX_INVALID_PER_MINUTE} within a minute",
                retry_after_s=math.ceil(began + _MINUTE_S - now),
                todo="correct the API key; requests with a valid key are accepted without waiting",
            )
        if began == now:
            self._peers.pop(peer, None)  # moves the peer to the end
        self._peers[peer] = began, count + 1
        if len(self._peers) > _MAX_PEERS:
            del self._peers[next(iter(self._peers))]
        return count + 1 == MAX_INVALID_PER_MINUTE
