"""How many wrong keys one peer may try in a minute: enough for whoever has mistyped one.

Nobody finds a secret by trying, so a right key is never kept waiting by the wrong ones of whoever shares its address.
"""

import math
import time
from collections.abc import Callable

from serving.http.peer import peer_of
from svc.errors import SvcError

MOST_A_MINUTE = 20
_MINUTE_S = 60.0
_MOST_PEERS = 4096
"""Beyond, the peer is forgotten whose minute began first."""


class TooManyWrongKeysError(SvcError):
    """A peer has tried one wrong key after the other.

    Args:
        retry_after_s: until its minute is over.
    """

    def __init__(self, wrong: str, *, retry_after_s: int, todo: str) -> None:
        super().__init__(wrong, todo=todo)
        self.retry_after_s = retry_after_s


class FailedKeys:
    """Counts them by peer, in minutes that begin with a peer's first.

    Args:
        clock: monotonic time, seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._peers: dict[str, tuple[float, int]] = {}  # the oldest minute first

    def __len__(self) -> int:
        return len(self._peers)

    def add(self, address: str) -> bool:
        """Counts one; whether it is the last that is let pass in this minute.

        Raises:
            TooManyWrongKeysError: it is one too many.
        """
        peer, now = peer_of(address), self._clock()
        began, count = self._peers.get(peer, (now, 0))
        if now - began >= _MINUTE_S:
            began, count = now, 0
        if count >= MOST_A_MINUTE:
            raise TooManyWrongKeysError(
                f"{MOST_A_MINUTE} wrong keys within a minute came from this address",
                retry_after_s=math.ceil(began + _MINUTE_S - now),
                todo="correct the key; a right one is let in at once",
            )
        if began == now:
            self._peers.pop(peer, None)  # to the end
        self._peers[peer] = began, count + 1
        if len(self._peers) > _MOST_PEERS:
            del self._peers[next(iter(self._peers))]
        return count + 1 == MOST_A_MINUTE
