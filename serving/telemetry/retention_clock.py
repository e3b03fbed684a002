"""Decides when rows are too old to keep, using a wall clock that may be wrong.

If the clock were a year ahead even for a minute, because of a bad time server or a resumed virtual machine,
all rows would be deleted. The wall clock is therefore trusted only while it advances at the same rate as
the time since boot.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

log = logging.getLogger(__name__)

_TOLERANCE_S = 3600.0
_MAX_DOUBT_S = 86_400.0
_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # the first also advances during suspend


def _since_boot() -> float:
    return time.clock_gettime(_BOOT_CLOCK)


@dataclass(eq=False)
class RetentionClock:
    """Decides when rows are too old to keep.

    A clock that has jumped is trusted again once it has been steady for a day, or for `max_age` if that is
    shorter.

    Attributes:
        max_age: maximum age of rows to keep.
        now: function that returns wall-clock time.
        elapsed_s: function that returns the seconds since a fixed moment, independently of the wall clock.
        rows, setting: noun for the rows, and name of the setting that holds their maximum age; both are used in log
            messages.
    """

    max_age: timedelta
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    elapsed_s: Callable[[], float] = _since_boot
    rows: str = "requests"
    setting: str = "request_log.max_age_days"

    def __post_init__(self) -> None:
        self._doubt_s = min(_MAX_DOUBT_S, self.max_age.total_seconds())
        self._trusted: float | None = None  # trusted difference between the two clocks, seconds
        self._doubted: tuple[float, float] | None = None  # a new difference, and since when

    def oldest_kept(self, newest: Callable[[], datetime | None]) -> datetime | None:
        """Return the time before which rows are too old to keep, or None while the clock is not trusted.

        Args:
            newest: function that returns the newest row's time, or None if there are no rows. Only the
                first call uses it: if even the newest row is too old, the clock may be wrong.
        """
        now, elapsed_s = self.now(), self.elapsed_s()
        ahead_s = now.timestamp() - elapsed_s
        if self._trusted is None and self._doubted is None:
            last = newest()
            if last is None or now - last <= self.max_age:
                self._trusted = ahead_s
        if not _agree(ahead_s, self._trusted):
            if self._doubted is None or not _agree(ahead_s, self._doubted[0]):
                self._doubted = ahead_s, elapsed_s
                self._warn(ahead_s)
            if elapsed_s - self._doubted[1] < self._doubt_s:
                return None
        self._trusted, self._doubted = ahead_s, None
        return now - self.max_age

    def _warn(self, ahead_s: float) -> None:
        if self._trusted is None:
            why = f"all stored {self.rows} are older than `{self.setting}`"
        else:
            why = f"the clock jumped by {timedelta(seconds=round(ahead_s - self._trusted))}"
        steady = timedelta(seconds=self._doubt_s)
        log.warning("%s; not deleting %s by age until the clock has been steady for %s", why, self.rows, steady)


def _agree(ahead_s: float, before_s: float | None) -> bool:
    return before_s is not None and abs(ahead_s - before_s) <= _TOLERANCE_S
