"""Limits the number of request bodies that are being received at the same time.

The limit is needed because a body takes up memory before the server knows which model it is for. A body that arrives
together with its headers needs no slot.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from serving.admission.errors import OverloadedError


class BodySlots:
    """A limited number of slots for requests whose bodies are being received.

    Args:
        most: number of slots. One peer may take half of them, so that a client that sends slowly leaves
            slots for other clients. Half of the slots are enough for a proxy in front of all clients.
        doing: verb phrase that completes the error message "N requests are ...".
    """

    def __init__(self, most: int, doing: str = "being sent") -> None:
        self._most = most
        self._doing = doing
        self._reading: Counter[str] = Counter()

    @contextmanager
    def reading(self, peer: str) -> Iterator[None]:
        """Reserve a slot for a request while the `with` block runs.

        Args:
            peer: key or address from which the request came.

        Raises:
            OverloadedError: no slot is free for this peer. Requests do not wait for slots, because the requests that
                hold them may never complete.
        """
        taken = self._reading.total()
        if taken >= self._most or self._reading[peer] >= max(1, self._most // 2):
            raise OverloadedError(
                f"{taken} requests are {self._doing}, {self._reading[peer]} of them from {peer or 'this client'}",
                todo="retry the request later",
            )
        self._reading[peer] += 1
        try:
            yield
        finally:
            self._reading[peer] -= 1
            if not self._reading[peer]:
                del self._reading[peer]
