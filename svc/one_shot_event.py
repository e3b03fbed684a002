"""Something that ends once, as a connection or the right to a key, and whoever is to hear of it at once.

A future costs several times as much in every request: it belongs to a loop, and copies a context for each callback.
"""

from collections.abc import Callable

Listener = Callable[[], None]


class OneShotEvent:
    """Of one thing.

    Attributes:
        ended: it has.
        error: why, where that is known.
    """

    __slots__ = ("_listeners", "ended", "error")

    def __init__(self) -> None:
        self._listeners: dict[Listener, None] = {}  # in their order; one key can have a thousand requests
        self.ended = False
        self.error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        """It ends now, if it has not before."""
        if self.ended:
            return
        self.ended, self.error = True, error
        for listener in list(self._listeners):
            listener()

    def listen(self, listener: Listener) -> None:
        """From now on somebody hears of the end; at once where that has been."""
        self._listeners[listener] = None
        if self.ended:
            listener()

    def forget(self, listener: Listener) -> None:
        """He hears no more."""
        self._listeners.pop(listener, None)
