"""How many requests may come in at once: a body takes memory before anybody knows which model it is for.

One that has come with its headers is here already, and needs no place.
"""

from collections import Counter
from dataclasses import dataclass

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

    def reading(self, peer: str) -> "BodySlot":
        """A body comes in during the body of the `with`; entering raises OverloadedError where too many do already.

        Args:
            peer: key or address that it comes from.
        """
        return BodySlot(self, peer)

    def enter(self, peer: str) -> None:
        """Takes a place until `leave`.

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

    def leave(self, peer: str) -> None:
        """Gives the place back."""
        self._reading[peer] -= 1
        if not self._reading[peer]:
            del self._reading[peer]


@dataclass(slots=True)
class BodySlot:
    """A place for the body of a `with`. A class, since a generator costs several times as much in every request."""

    slots: BodySlots
    peer: str

    def __enter__(self) -> None:
        self.slots.enter(self.peer)

    def __exit__(self, *_: object) -> None:
        self.slots.leave(self.peer)
