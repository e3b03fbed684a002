"""Clocks that tests advance."""


class Clock:
    """A clock in seconds that advances only when told to.

    Attributes:
        now: current time in seconds.
    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
