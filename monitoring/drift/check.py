"""Runs one drift check for a version: passes new requests through the detector and stores the results.

The results do not depend on how often checks run or on which process runs them. A lock in tuneserve's home folder
and, with PostgreSQL, a lease ensure that only one check runs at a time.
"""

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Engine as Store

from monitoring.drift.alarms import AlarmBook
from monitoring.drift.budget import Signal
from monitoring.drift.detector import SEEN, Baseline, Detector
from monitoring.drift.ratings import RatingState, accept_ratings, check_ratings
from monitoring.drift.report import SignalReport, Status
from monitoring.drift.rows import DriftState, keep_drift, read_drift_baseline, read_drift_states
from monitoring.drift.traffic import SIGNALS, TrafficState, accepted_baseline, check_traffic
from svc.drift_reference.reference import read_reference
from svc.drift_reference.sample import Sample
from svc.errors import RefusedError
from svc.files.lock import hold_lock
from svc.redaction import Redactor
from svc.registry.registry import Registry
from svc.settings.monitoring import RequestLogSettings
from svc.store.answered import was_answered
from svc.store.drift_items import StoredItem, item_ids, prune_items, read_items, read_items_with
from svc.store.leases import Lease, hold_lease
from svc.version import Target

log = logging.getLogger(__name__)

LOCK_FILE: Final = "drift.lock"
LEASE: Final = "*drift"
"""Name of the lease that is held while drift is checked. No model can have this name."""
_WHAT = "the drift check"
REPORT: Final = TypeAdapter(SignalReport)
_TRAFFIC_STATE: Final = TypeAdapter(TrafficState)
_RATING_STATE: Final = TypeAdapter(RatingState)
_MIN_REFERENCE = 10
_MAX_READ = 5_000
"""Maximum number of requests read per check. After days without a check, only the newest ones are read."""
_STALE = timedelta(hours=1)
"""If no features have been stored for this long although requests were answered, the server is assumed not to store
features."""
_MAKING = timedelta(minutes=10)
"""Requests without features are ignored until they are this old, because the process that computes features
needs time to start."""
_SCORING = timedelta(minutes=5)
"""Maximum time to wait for the log-probability of a request's answer, measured from the request's start. Meanwhile,
checks process neither this request nor newer ones. Log-probabilities are computed only if the server stores
contents."""
_NO_FEATURES = "the server does not store features of new requests; set request_log.features and restart the server"
State = TypeVar("State")
Array = NDArray[Any]


def baseline_bytes(baseline: Baseline) -> bytes:
    """Return the baseline serialized as a NumPy archive without pickled objects."""
    arrays = {
        **_arrays("prompts", baseline.prompts),
        **_arrays("answers", baseline.answers),
        "words": np.concatenate([np.zeros(0, np.int32), *baseline.words]),
        "word_counts": np.array([len(words) for words in baseline.words], dtype=np.int64),
    }
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return file.getvalue()


def read_baseline(data: bytes) -> Baseline:
    """Deserialize a baseline from bytes written by `baseline_bytes`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    words = np.split(arrays["words"], np.cumsum(arrays["word_counts"]))[:-1]  # the last part is empty
    return Baseline(_sample("prompts", arrays), words, _sample("answers", arrays))


def _arrays(side: str, sample: Sample) -> dict[str, Array]:
    return {
        f"{side}/size": np.array(sample.size),
        **{f"{side}/number/{name}": values for name, values in sample.numbers.items()},
        **{f"{side}/category/{name}": values for name, values in sample.categories.items()},
        **{f"{side}/view/{place}": view for place, view in enumerate(sample.views)},
    }


def _sample(side: str, arrays: dict[str, Array]) -> Sample:
    numbers, categories, views = (_columns(f"{side}/{kind}/", arrays) for kind in ("number", "category", "view"))
    return Sample(int(arrays[f"{side}/size"]), numbers, categories, tuple(views.values()))


def _columns(prefix: str, arrays: dict[str, Array]) -> dict[str, Array]:
    return {key.removeprefix(prefix): values for key, values in arrays.items() if key.startswith(prefix)}


@contextmanager
def only_check(home: Path, store: Store) -> Iterator[Lease | None]:
    """While the `with` body runs, prevent other processes with the same home folder or store from checking drift.

    Raises:
        BusyError: another process is running a check.
    """
    with hold_lock(home / LOCK_FILE, _WHAT), hold_lease(store, LEASE, _WHAT) as lease:
        yield lease


@dataclass(frozen=True)
class _Bets:
    """A drift detector for one version's traffic, together with the reference it was built from.

    Attributes:
        accepted: traffic that was accepted as the new reference, or None if the version's examples are the reference.
        detector: the detector, or None if nothing can be compared.
        missing: the reason why answers cannot be compared or, if `detector` is None, why nothing can be compared.
    """

    target: Target
    accepted: bytes | None
    detector: Detector | None
    missing: str


class DriftCheck:
    """Runs drift checks for the versions in a tuneserve home folder, and caches one detector per model.

    Args:
        settings: request log settings; they determine how texts are redacted before features are computed.
        clock: returns the current time.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        settings: RequestLogSettings,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._registry = registry
        self._store = store
        self._redactor = Redactor(settings.redact)
        self._scores = settings.content_share > 0
        self._clock = clock
        self._bets: dict[str, _Bets] = {}

    def run(self, target: Target, lease: Lease | None = None) -> list[SignalReport]:
        """Check the new requests and ratings of a target (a version in one format), store the results, and return the
        reports.

        Args:
            lease: the lease yielded by `only_check`.

        Raises:
            LeaseLostError: another process has taken over the lease. Nothing is stored.
            NotFoundError: the version does not exist.
            IntegrityError: the version's files differ from its manifest.
        """
        traffic, ratings = self._states(target)
        accepted = read_drift_baseline(self._store, target)
        states = read_drift_states(self._store, target)
        earlier = read_reports(states)[:2]
        return self._advance(target, traffic, ratings, AlarmBook(self._store, target), accepted, lease, earlier)

    def accept(self, target: Target, lease: Lease | None = None) -> list[str]:
        """End a version's active alarms. The traffic received since the alarms began becomes the new reference.

        Traffic alarms and rating alarms are accepted independently of each other.

        Returns:
            The names of the features whose alarms were ended.

        Raises:
            RefusedError: no alarm is active, or too few requests or ratings have arrived since the alarms began.
            NotFoundError, IntegrityError, LeaseLostError: see `run`.
        """
        (traffic, ratings), alarms = self._states(target), AlarmBook(self._store, target)
        accepted = read_drift_baseline(self._store, target)
        refused, features = list[RefusedError](), list[str]()
        detector = self._bets_on(target, accepted).detector
        if detector and (lasting := [name for signal in SIGNALS for name in alarms.lasting(signal)]):
            try:
                accepted = baseline_bytes(accepted_baseline(detector, traffic, self._items(target, traffic)))
            except RefusedError as error:
                refused.append(error)
            else:
                traffic = replace(traffic, watch=replace(traffic.watch, features={}))
                features += lasting
                for signal in SIGNALS:
                    alarms.end_all(signal, self._clock())
        if people := alarms.lasting(Signal.PEOPLE):
            try:
                ratings = accept_ratings(self._store, target, ratings, max(alarm.since for alarm in people.values()))
            except RefusedError as error:
                refused.append(error)
            else:
                features += people
                alarms.end_all(Signal.PEOPLE, self._clock())
        if not features:
            todo = f"run `svc drift {target.version}` to see its alarms"
            none = RefusedError(f"{target.version} has no active drift alarm", todo=todo)
            raise refused[0] if refused else none
        self._advance(target, traffic, ratings, alarms, accepted, lease)
        return features

    def _states(self, target: Target) -> tuple[TrafficState, RatingState]:
        states = read_drift_states(self._store, target)
        traffic, people = states.get(Signal.INPUT), states.get(Signal.PEOPLE)
        return _read(_TRAFFIC_STATE, traffic, TrafficState()), _read(_RATING_STATE, people, RatingState())

    def _advance(
        self,
        target: Target,
        traffic: TrafficState,
        ratings: RatingState,
        alarms: AlarmBook,
        accepted: bytes | None,
        lease: Lease | None,
        earlier: Sequence[SignalReport] = (),
    ) -> list[SignalReport]:
        """Check new requests and ratings, and store all results in one transaction.

        Args:
            earlier: the previous traffic reports, which are returned again if there are no new requests.
        """
        lasting = [alarms.report(report.signal) for report in earlier]
        if self._is_idle(target, traffic, accepted, earlier) and lasting == [report.alarms for report in earlier]:
            reports = list(earlier)
        else:
            traffic, reports = self._check_traffic(target, traffic, alarms, accepted)
        ratings, people = check_ratings(self._store, target, ratings, self._clock(), alarms)
        reports = [*reports, people]
        states = {
            Signal.INPUT: _TRAFFIC_STATE.dump_json(traffic),
            Signal.OUTPUT: b"",  # one stream with the input
            Signal.PEOPLE: _RATING_STATE.dump_json(ratings),
        }
        stored = [
            DriftState(
                report.signal,
                states[report.signal].decode("utf-8"),
                REPORT.dump_json(report).decode("utf-8"),
                self._clock(),
            )
            for report in reports
        ]
        keep_drift(self._store, target, stored, alarms.changed, accepted, lease=lease)
        unseen = item_ids(self._store, target, after=traffic.cursor)
        prune_items(self._store, target, {*traffic.kept, *unseen}, SEEN)
        return reports

    def _check_traffic(
        self, target: Target, state: TrafficState, alarms: AlarmBook, accepted: bytes | None
    ) -> tuple[TrafficState, list[SignalReport]]:
        bets, items = self._bets_on(target, accepted), self._items(target, state)
        off = "" if bets.detector else bets.missing
        stale = self._are_stale(target)
        if not items and not off and stale:
            off = _NO_FEATURES
        if off or bets.detector is None:
            for signal in SIGNALS:
                alarms.end_all(signal, self._clock())
            watch = replace(state.watch, features={})
            return replace(state, watch=watch), [SignalReport(signal, Status.OFF, off) for signal in SIGNALS]
        state, reports = check_traffic(bets.detector, state, items, alarms, self._clock())
        if stale:
            reports = [
                report if report.alarms else replace(report, status=Status.UNWATCHED, why=_NO_FEATURES)
                for report in reports
            ]
        if Signal.OUTPUT not in bets.detector.signals.values():
            reports = [reports[0], SignalReport(Signal.OUTPUT, Status.OFF, bets.missing)]
        return state, reports

    def _is_idle(
        self, target: Target, state: TrafficState, accepted: bytes | None, earlier: Sequence[SignalReport]
    ) -> bool:
        """Return whether the earlier traffic reports are still current.

        They are current if this process computed them with the same reference and no new request has arrived since.
        """
        bets = self._bets.get(target.version.name)
        same = bets is not None and (bets.target, bets.accepted) == (target, accepted)
        compared = len(earlier) == len(SIGNALS) and earlier[0].status is not Status.OFF
        newest = self._newest(target)
        return same and compared and newest is not None and newest.id <= state.cursor and not self._are_stale(target)

    def _are_stale(self, target: Target) -> bool:
        """Return whether requests are still being answered, but no features have been stored for a long time."""
        newest = self._newest(target)
        since = newest.item.started_at + _STALE if newest else None
        return was_answered(self._store, target, after=since, before=self._clock() - _MAKING)

    def _newest(self, target: Target) -> StoredItem | None:
        return next(iter(read_items(self._store, target, after=0, newest=1)), None)

    def _items(self, target: Target, state: TrafficState) -> list[StoredItem]:
        """Return the requests to process, oldest first.

        They include new requests and earlier requests that are needed for comparison: the newest ones, and those that
        earlier checks counted.
        """
        kept = read_items_with(self._store, target, state.kept)
        newest = read_items(self._store, target, after=0, newest=_MAX_READ)
        items = sorted({item.id: item for item in (*kept, *newest)}.values(), key=lambda item: item.id)
        return [*takewhile(lambda item: item.id <= state.cursor or not self._is_awaited(item), items)]

    def _is_awaited(self, item: StoredItem) -> bool:
        """Return whether an answer's log-probability is missing but may still be computed."""
        scored = item.logprob is not None or not self._scores
        return not scored and self._clock() - item.item.started_at < _SCORING

    def _bets_on(self, target: Target, accepted: bytes | None) -> _Bets:
        name = target.version.name
        bets = self._bets.get(name)
        if bets is None or (bets.target, bets.accepted) != (target, accepted):
            bets = self._bets[name] = self._make_bets(target, accepted)
        return bets

    def _make_bets(self, target: Target, accepted: bytes | None) -> _Bets:
        reference = read_reference(self._registry, target, self._redactor)
        if accepted is not None:
            return _Bets(target, accepted, Detector(read_baseline(accepted)), reference.missing)
        if reference.prompts is None:
            return _Bets(target, None, None, reference.missing)
        if reference.prompts.size < _MIN_REFERENCE:
            few = (
                f"found only {reference.prompts.size} examples to compare with; at least {_MIN_REFERENCE} are required"
            )
            return _Bets(target, None, None, few)
        baseline = Baseline(reference.prompts, reference.words, reference.answers or Sample(0))
        return _Bets(target, None, Detector(baseline), reference.missing)


def read_reports(states: Mapping[str, DriftState]) -> list[SignalReport]:
    """Return the reports of the last check. Reports in another release's incompatible format are skipped."""
    reports = list[SignalReport]()
    for signal in Signal:
        try:
            if signal in states:
                reports.append(REPORT.validate_json(states[signal].report))
        except ValidationError:
            log.warning("cannot read the latest drift report for %s", signal, exc_info=True)
    return reports


def _read(kind: TypeAdapter[State], stored: DriftState | None, first: State) -> State:
    """Return the stored state, or `first` if no state is stored or its format is incompatible with this release."""
    try:
        return kind.validate_json(stored.state) if stored else first
    except ValidationError:
        log.warning("cannot read the stored drift detection state; starting from scratch", exc_info=True)
        return first
