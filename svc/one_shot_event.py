"""An event that happens once, such as the end of a connection or of a key's validity, and calls its listeners.

A future costs several times as much in every request: it belongs to a loop, and copies a context for each callback.
"""

from collections.abc import Callable

Listener = Callable[[], None]


class OneShotEvent:
    """The end of one thing.

    Attributes:
        ended: whether the end has happened.
        error: the reason, if known.
    """

    __slots__ = ("_listeners", "ended", "error")

    def __init__(self) -> None:
        self._listeners: dict[Listener, None] = {}  # ordered; one key can have a thousand requests
        self.ended = False
        self.error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        """Set the event and call all listeners, unless that has happened before."""
        if self.ended:
            return
        self.ended, self.error = True, error
        for listener in list(self._listeners):
            listener()

    def listen(self, listener: Listener) -> None:
        """Add a listener; call it immediately if the event has happened."""
        self._listeners[listener] = None
        if self.ended:
            listener()

    def forget(self, listener: Listener) -> None:
        """Remove a listener."""
        self._listeners.pop(listener, None)
