"""Replays streams through the drift detector and through conventional tests.

No threshold here was derived from changed prompts. The conventional tests compare batches of 100
requests on five readable features, using the Kolmogorov-Smirnov test with p < 0.05, or PSI > 0.2.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from benchmarks.drift.prompts import Places, Pool, read_pool
from benchmarks.drift.streams import CHANGE_AFTER, WITH_CHANGE, WITHOUT_CHANGE, Stream, draw_reference
from monitoring.drift.detector import MEMORY, SEEN, Detector, Seen, Watch
from monitoring.drift.evidence import Event
from monitoring.drift.report import number_stability
from svc.drift_reference.prompt import PromptFeature
from svc.drift_reference.sample import Floats
from svc.terminal import counting, waiting

REQUESTS = 15_000
"""Number of requests in one replay of a stream that does not change."""
CUSTOMARY_P, CUSTOMARY_PSI, CUSTOMARY_SIZE = 0.05, 0.2, 100
_TOGETHER = 200
_FEATURES = tuple(
    feature.value
    for feature in (
        PromptFeature.CHARACTERS,
        PromptFeature.DISTINCT_WORDS,
        PromptFeature.UNKNOWN_WORDS,
        PromptFeature.WORD_LENGTH,
        PromptFeature.SYMBOLS,
    )
)


@dataclass(frozen=True)
class Replay:
    """The drift detector's result on a stream.

    Attributes:
        kept: indexes of the counted requests.
        events: starts and ends of alarms; an event's position is a number of counted requests.
    """

    kept: Sequence[int]
    events: Sequence[Event]

    def place(self, event: Event) -> int:
        """Return the stream index of the request at which an alarm started or ended."""
        return self.kept[event.position - 1]

    @property
    def alarms(self) -> list[Event]:
        """Return only the events that start an alarm."""
        return [event for event in self.events if event.alarm]

    def in_alarm(self, requests: int) -> int:
        """Return the number of requests during which at least one alarm was active."""
        lasting, began, total = set[str](), 0, 0
        for event in self.events:
            if event.alarm and not lasting:
                began = self.place(event)
            (lasting.add if event.alarm else lasting.discard)(event.feature)
            if not lasting:
                total += self.place(event) - began
        return total + (requests - began if lasting else 0)


def replay(pool: Pool, detector: Detector, stream: Stream, until: Callable[[Replay], bool] | None = None) -> Replay:
    """Replay a stream through the drift detector.

    Args:
        until: returns whether the result so far is sufficient and the replay can stop early; None replays
            the whole stream.
    """
    watch, kept, events = Watch(), list[int](), list[Event]()
    nothing = pool.requests(np.zeros(0, dtype=np.intp), first=0)
    before, seen = nothing, list[Seen]()
    for first in range(0, len(stream.prompts), _TOGETHER):
        part = slice(first, first + _TOGETHER)
        talks = None if stream.conversations is None else stream.conversations[part]
        clients = None if stream.clients is None else stream.clients[part]
        new = pool.requests(stream.prompts[part], first=first, conversations=talks, clients=clients)
        advance = detector.advance(watch, before, seen, new)
        watch = advance.watch
        kept += [first + int(place) for place in advance.kept]
        events += advance.events
        both = before.followed_by(new.at(advance.kept))
        before = both.at(np.arange(max(0, both.size - MEMORY), both.size))
        seen = [*seen, *map(Seen, new.words, new.clients)][-SEEN:]
        result = Replay(kept, events)
        if until and until(result):
            break
    return result


@dataclass(frozen=True, slots=True)
class Quiet:
    """Result of replaying a stream without a change.

    Attributes:
        kept: number of counted requests.
        in_alarm: number of requests during an alarm.
        by_ks, by_psi: number of 100-request batches flagged as drift by each conventional test.
    """

    requests: int
    kept: int
    alarms: int
    in_alarm: int
    by_ks: int
    by_psi: int


def watch_quiet(pool: Pool, name: str, seed: int) -> Quiet:
    """Replay a stream that does not change."""
    reference, live, generator = draw_reference(pool, seed + 100)
    stream = WITHOUT_CHANGE[name](pool, live, generator, REQUESTS)
    result = replay(pool, Detector(pool.baseline(reference)), stream)
    by_ks, by_psi = by_custom(pool, reference, stream)
    return Quiet(REQUESTS, len(result.kept), len(result.alarms), result.in_alarm(REQUESTS), by_ks, by_psi)


def by_custom(pool: Pool, reference: Places, stream: Stream) -> tuple[int, int]:
    """Return the number of batches that the conventional tests flag as drift, by Kolmogorov-Smirnov and by PSI."""
    from scipy.stats import ks_2samp

    columns = [pool.sample.numbers[name] for name in _FEATURES]
    batches = [stream.prompts[at : at + CUSTOMARY_SIZE] for at in range(0, len(stream.prompts), CUSTOMARY_SIZE)]
    by_ks = by_psi = 0
    for batch in batches:
        pairs: list[tuple[Floats, Floats]] = [(column[reference], column[batch]) for column in columns]
        by_ks += any(ks_2samp(*pair, method="asymp").pvalue < CUSTOMARY_P for pair in pairs)
        by_psi += any(number_stability(*pair).index > CUSTOMARY_PSI for pair in pairs)
    return by_ks, by_psi


@dataclass(frozen=True, slots=True)
class Found:
    """The first alarm after a change, with None if there was no alarm.

    Attributes:
        requests, kept: number of all requests and of counted requests from the change to the alarm.
        feature: feature that raised the alarm; empty if there was no alarm.
    """

    requests: int | None
    kept: int | None
    feature: str


def watch_change(pool: Pool, name: str, seed: int) -> Found:
    """Replay a changing stream until the first alarm after the change."""
    reference, live, generator = draw_reference(pool, seed)
    stream = WITH_CHANGE[name].make(pool, live, generator)

    def first_alarm(result: Replay) -> Event | None:
        return next((event for event in result.alarms if result.place(event) >= CHANGE_AFTER), None)

    detector = Detector(pool.baseline(reference))
    result = replay(pool, detector, stream, lambda so_far: first_alarm(so_far) is not None)
    alarm = first_alarm(result)
    if alarm is None:
        return Found(None, None, "")
    kept_before = sum(place < CHANGE_AFTER for place in result.kept)
    return Found(result.place(alarm) - CHANGE_AFTER + 1, alarm.position - kept_before, alarm.feature)


@dataclass(frozen=True, slots=True)
class Job:
    """A single replay of one stream."""

    name: str
    changes: bool
    seed: int


_pool: Pool | None = None


def _prepare(pool: Pool) -> None:
    global _pool
    _pool = pool


def _run(job: Job) -> Quiet | Found:
    assert _pool is not None
    return watch_change(_pool, job.name, job.seed) if job.changes else watch_quiet(_pool, job.name, job.seed)


def run_all(jobs: Sequence[Job]) -> list[Quiet | Found]:
    """Run all replay jobs in parallel, with one process per core."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with waiting("reading and embedding prompts"):
        prompts = read_pool()
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _prepare, (prompts,))
    with pool, counting("replays", len(jobs)) as advance:
        futures = [pool.submit(_run, job) for job in jobs]
        for future in futures:
            future.add_done_callback(lambda _: advance())
        return [future.result() for future in futures]
