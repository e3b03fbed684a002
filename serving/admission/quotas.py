"""How much of one limit of a key is taken, and when there is room again: of a minute, of a day, at once.

What a request may use is reserved while it runs, and stays reserved: a reservation does not run out with time, as what
was used does. So a key never has more of a minute's limit reserved and used together than the limit is. Times are
given, none is asked for.
"""

from abc import ABC, abstractmethod

DAY_S = 86_400
UNTIL_ONE_ENDS_S = 1.0
"""Waited where room comes only with the end of a request, which nobody knows."""
_ROUNDING = 1e-9


class Quota(ABC):
    """What is taken of one limit. A limit is given each time, since that of a key may change.

    Attributes:
        reserved: what is taken until it is settled; whoever reserves adds to it.
    """

    def __init__(self) -> None:
        self._used = 0.0
        self.reserved = 0

    @abstractmethod
    def free(self, now: float, limit: int) -> float:
        """What may be reserved now, with a share of the limit for rounding; negative where more is taken than there is.

        Args:
            now: the time in the quota's own clock, seconds: what has come free with it is given back first.
        """

    @abstractmethod
    def reset_s(self, now: float, limit: int) -> float:
        """Until all that was used is free again, seconds; what is reserved not counted, whose end nobody knows."""

    @abstractmethod
    def _until_free_s(self, missing: float, now: float, limit: int) -> float:
        """Until so much of what was used is free again, seconds."""

    def unused(self, limit: int) -> int:
        """What may be reserved once all that runs has ended without using anything."""
        return max(0, int(limit - self._used))

    def wait_s(self, amount: int, now: float, limit: int) -> float:
        """Until there is room for so much, seconds; of use where there is none now."""
        missing = self._used + self.reserved + amount - limit
        if missing > self._used + _ROUNDING * limit:
            return UNTIL_ONE_ENDS_S
        return self._until_free_s(missing, now, limit)

    def settle(self, amount: int, used: int) -> None:
        """Gives a reservation back, of which this was used; it may be more than was reserved by an estimate."""
        self.reserved -= amount
        self._used += used


class MinuteQuota(Quota):
    """So much a minute: what was used comes free again evenly, the whole limit within a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._at = 0.0

    def free(self, now: float, limit: int) -> float:
        if self._used:
            used = self._used - (now - self._at) * limit / 60
            self._used = used if used > 0 else 0.0
        self._at = now
        return limit - self._used - self.reserved + _ROUNDING * limit

    def reset_s(self, now: float, limit: int) -> float:
        return self._used * 60 / limit if limit else 0.0

    def _until_free_s(self, missing: float, now: float, limit: int) -> float:
        return missing * 60 / limit


class DayQuota(Quota):
    """So much a day, from midnight UTC; its clock is the seconds since 1970."""

    def __init__(self) -> None:
        super().__init__()
        self._day = 0

    def free(self, now: float, limit: int) -> float:
        day = int(now // DAY_S)
        if day != self._day:
            self._day, self._used = day, 0.0
        return limit - self._used - self.reserved + _ROUNDING * limit

    def reset_s(self, now: float, limit: int) -> float:
        return DAY_S - now % DAY_S

    def _until_free_s(self, missing: float, now: float, limit: int) -> float:
        return self.reset_s(now, limit)


class RunningQuota(Quota):
    """So much at once: all that ends is free."""

    def free(self, now: float, limit: int) -> float:
        self._used = 0.0
        return limit - self.reserved

    def reset_s(self, now: float, limit: int) -> float:
        return 0.0

    def _until_free_s(self, missing: float, now: float, limit: int) -> float:
        return UNTIL_ONE_ENDS_S
