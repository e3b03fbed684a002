"""An event that happens at most once and then calls its listeners, such as the closing of a connection
or the expiry of a key.

A future would cost several times as much per request, because it is bound to a loop and copies a context
for each callback.
"""

from collections.abc import Callable

Listener = Callable[[], None]


class OneShotEvent:
    """An event that happens at most once.

    Attributes:
        ended: whether the event has happened.
        error: the error that caused the event, or None if unknown.
    """

    __slots__ = ("_listeners", "ended", "error")

    def __init__(self) -> None:
        self._listeners: dict[Listener, None] = {}  # ordered; one key can have a thousand requests
        self.ended = False
        self.error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        """Trigger the event and call all listeners. Does nothing if it was already triggered."""
        if self.ended:
            return
        self.ended, self.error = True, error
        for listener in list(self._listeners):
            listener()

    def listen(self, listener: Listener) -> None:
        """Add a listener, and call it immediately if the event has already happened."""
        self._listeners[listener] = None
        if self.ended:
            listener()

    def forget(self, listener: Listener) -> None:
        """Remove a listener."""
        self._listeners.pop(listener, None)
