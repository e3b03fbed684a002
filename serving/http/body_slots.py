"""Limits how many bodies are received concurrently: a body takes memory before its model is known.

A body that arrived together with its headers needs no place.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from serving.admission.errors import OverloadedError


class BodySlots:
    """The places for requests whose bodies are being received.

    Args:
        most: number of places. One peer may take half of them: a client that sends slowly leaves places for the
            others, and a proxy in front of all clients has enough.
        doing: the phrase that an error uses for these requests.
    """

    def __init__(self, most: int, doing: str = "being sent") -> None:
        self._most = most
        self._doing = doing
        self._reading: Counter[str] = Counter()

    @contextmanager
    def reading(self, peer: str) -> Iterator[None]:
        """Take a place during the `with`.

        Args:
            peer: key or address that the request comes from.

        Raises:
            OverloadedError: no place is free. Not waited for: the other requests may never end.
        """
        taken = self._reading.total()
        if taken >= self._most or self._reading[peer] >= max(1, self._most // 2):
            raise OverloadedError(
                f"{taken} requests are {self._doing}, {self._reading[peer]} of them from {peer or 'here'}",
                todo="send the request again later",
            )
        self._reading[peer] += 1
        try:
            yield
        finally:
            self._reading[peer] -= 1
            if not self._reading[peer]:
                del self._reading[peer]
