"""An event that happens once, such as the end of a connection or of a key's validity, and calls listeners.

A future would cost several times as much per request: it is bound to a loop and copies a context for each callback.
"""

from collections.abc import Callable

Listener = Callable[[], None]


class OneShotEvent:
    """An event that happens at most once.

    Attributes:
        ended: whether the event has happened.
        error: error given as the event's reason; None if unknown.
    """

    __slots__ = ("_listeners", "ended", "error")

    def __init__(self) -> None:
        self._listeners: dict[Listener, None] = {}  # ordered; one key can have a thousand requests
        self.ended = False
        self.error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        """Make the event happen and call all listeners; does nothing if it has already happened."""
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
