"""How many requests may come in at once: a body takes memory before anybody knows which model it is for.

One that has come with its headers is here already, and needs no place.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from serving.admission.errors import OverloadedError


class BodySlots:
    """The places for requests whose bodies come in.

    Args:
        most: of all clients together. One peer may have half of them: a client that sends slowly leaves room for the
            others, and a proxy in front of all clients has enough.
        doing: what requests are doing there, for the error.
    """

    def __init__(self, most: int, doing: str = "being sent") -> None:
        self._most = most
        self._doing = doing
        self._reading: Counter[str] = Counter()

    @contextmanager
    def reading(self, peer: str) -> Iterator[None]:
        """Take a place for the body of the `with`.

        Args:
            peer: key or address that it comes from.

        Raises:
            OverloadedError: so many come in already; they may never end.
        """
        coming = self._reading.total()
        if coming >= self._most or self._reading[peer] >= max(1, self._most // 2):
            raise OverloadedError(
                f"{coming} requests are {self._doing}, {self._reading[peer]} of them from {peer or 'here'}",
                todo="send the request again later",
            )
        self._reading[peer] += 1
        try:
            yield
        finally:
            self._reading[peer] -= 1
            if not self._reading[peer]:
                del self._reading[peer]
