"""Watches one stream against its reference: which tests are due, what they find, when an alarm begins and ends.

Pure: it reads no store and no clock, and what it found yesterday comes in as a value. So the benchmark and the tests
replay streams through the very code that watches traffic.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from monitoring.drift.two_sample.alpha_spending import FALSE_ALARMS_PER_REQUEST, WINDOWS, Window, usable
from svc.drift_reference.sample import Sample

RECOVERY_EVERY = 10
RECOVERY_SIZE = 100
RECOVERED_P = 0.05
"""An alarm ends when no test of the newest items finds anything by this customary level."""


class Test(Protocol):
    """One comparison of a window with the reference.

    Attributes:
        name: of what is compared.
        share: of the signal's budget.
    """

    @property
    def name(self) -> str: ...

    @property
    def share(self) -> float: ...

    def p_value(self, live: Sample, alpha: float, seed: Sequence[int]) -> float:
        """At most `alpha` with probability at most `alpha` where nothing has moved."""
        ...


@dataclass(frozen=True, slots=True)
class Finding:
    """What one test found in one window.

    Attributes:
        test: its name.
        size: items in the window.
        alpha: the level that was spent.
    """

    test: str
    size: int
    p: float
    alpha: float

    @property
    def significant(self) -> bool:
        """It calls drift."""
        return self.p <= self.alpha


@dataclass(frozen=True, slots=True)
class Alarm:
    """Drift was called.

    Attributes:
        position: where in the stream, items.
        size: of the window in which it was found.
        findings: all that were significant.
    """

    position: int
    size: int
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Watch:
    """What is known of a stream so far.

    Attributes:
        position: items that were seen.
        fresh: items since the beginning, or since the last alarm ended; windows do not reach back beyond.
        alarm: while it lasts.
    """

    position: int = 0
    fresh: int = 0
    alarm: Alarm | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """An alarm that began or ended.

    Attributes:
        position: where, items.
        alarm: None when it ended.
    """

    position: int
    alarm: Alarm | None


class Detector:
    """The tests of one signal.

    Args:
        tests: their shares add up to at most 1.
        reference: items to compare with; decides which windows can be used.
        share: of the whole budget, see monitoring.drift.two_sample.alpha_spending.
        part: of the reference that a window may be as large as.
        stream: numbers that make the shuffles of one stream differ from another's.
    """

    def __init__(
        self,
        tests: Sequence[Test],
        reference: int,
        share: float,
        *,
        windows: Sequence[Window] = WINDOWS,
        part: float = 0.5,
        stream: Sequence[int] = (),
    ) -> None:
        self._tests = tests
        self._rate = FALSE_ALARMS_PER_REQUEST * share
        self._stream = tuple(stream)
        self.windows = usable(windows, reference, part)

    @property
    def memory(self) -> int:
        """Items before the new ones that `advance` needs to see."""
        return max((window.size for window in self.windows), default=0)

    def advance(self, watch: Watch, items: Sample, new: int) -> tuple[Watch, list[Event]]:
        """Takes new items.

        Args:
            watch: what is known.
            items: the new ones at the end, before them at least `memory` earlier ones, or all that there were.
            new: how many are new.
        """
        events = []
        for stop in range(items.size - new + 1, items.size + 1):
            watch = replace(watch, position=watch.position + 1, fresh=watch.fresh + 1)
            before = watch.alarm
            watch = self._recover(watch, before, items, stop) if before else self._look(watch, items, stop)
            if watch.alarm is not before:
                events.append(Event(watch.position, watch.alarm))
        return watch, events

    def _look(self, watch: Watch, items: Sample, stop: int) -> Watch:
        findings = [
            self._run(test, watch, items.part(stop - window.size, stop), window.alpha(self._rate) * test.share)
            for window in self.windows
            if watch.position % window.every == 0 and window.size <= min(watch.fresh, stop)
            for test in self._tests
        ]
        called = tuple(finding for finding in findings if finding.significant)
        if not called:
            return watch
        return replace(watch, alarm=Alarm(watch.position, min(finding.size for finding in called), called))

    def _recover(self, watch: Watch, alarm: Alarm, items: Sample, stop: int) -> Watch:
        """Ends an alarm that no test would call any more; what came before is forgotten, lest it is called again.

        It looks back to where the alarm was seen and no further: what was before the shift would hide it.
        """
        if watch.position % RECOVERY_EVERY:
            return watch
        size = min(RECOVERY_SIZE, self.memory, stop, watch.position - alarm.position + alarm.size)
        level = RECOVERED_P / len(self._tests)
        findings = [self._run(test, watch, items.part(stop - size, stop), level) for test in self._tests]
        if any(finding.significant for finding in findings):
            return watch
        return replace(watch, alarm=None, fresh=0)

    def _run(self, test: Test, watch: Watch, live: Sample, alpha: float) -> Finding:
        seed = (*self._stream, watch.position, live.size)
        return Finding(test.name, live.size, test.p_value(live, alpha, seed), alpha)
