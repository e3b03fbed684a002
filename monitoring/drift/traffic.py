"""Runs the stored features of a version's requests through the detector, and reports on prompts and answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from monitoring.drift.alarms import AlarmBook
from monitoring.drift.budget import Signal
from monitoring.drift.detector import MEMORY, SEEN, Baseline, Detector, Requests, Seen, Watch
from monitoring.drift.domain_classifier import CLASSIFIER
from monitoring.drift.evidence import Event
from monitoring.drift.report import EXAMPLES, Line, SignalReport, Status, feature_line, most_moved
from svc.drift_reference.item import answer_sample, prompt_sample
from svc.drift_reference.sample import Sample
from svc.errors import RefusedError
from svc.store.drift_items import StoredItem

SIGNALS = (Signal.INPUT, Signal.OUTPUT)
_SHOWN = 100
"""Maximum number of recent requests that are used to compute a report's lines and to choose an alarm's examples."""
_MIN_SHOWN = 10
_TOGETHER = 500
"""Number of new requests processed at a time. Run time and memory use grow with the square of this number."""
_MIN_SEEN = 200
"""Minimum number of requests for the fraction of compared requests to be meaningful."""
_FEW_KEPT, _NONE_KEPT = 0.2, 0.02
"""Thresholds for the fraction of the newest 1,000 requests that is compared with the reference. Below the first
threshold, the report contains a note. Below the second, the signal is reported as unwatched."""
_MIN_ACCEPTED, _MAX_ACCEPTED = 50, 500
"""Minimum and maximum number of requests in an accepted baseline."""


@dataclass(frozen=True, slots=True)
class TrafficState:
    """State carried over from one traffic check to the next.

    Attributes:
        cursor: id of the newest item seen so far.
        kept: ids of the newest items that count as evidence. Near copies and a client's excess requests do not count.
    """

    cursor: int = 0
    kept: tuple[int, ...] = ()
    watch: Watch = field(default_factory=Watch)


def check_traffic(
    detector: Detector, state: TrafficState, items: Sequence[StoredItem], alarms: AlarmBook, now: datetime
) -> tuple[TrafficState, list[SignalReport]]:
    """Process new requests, start and end alarms, and return the new state and the reports.

    Args:
        items: stored items, oldest first: all new items, plus the items in `state.kept` and the newest of the other
            items that earlier checks saw.
    """
    new = [item for item in items if item.id > state.cursor]
    for start in range(0, max(1, len(new)), _TOGETHER):
        state, traffic, strengths = _take(detector, state, items, new[start : start + _TOGETHER], alarms)
    for signal in SIGNALS:
        alarms.end_forgotten(signal, state.watch.features, now)
    return state, [traffic.report(signal, strengths, alarms) for signal in SIGNALS]


def _take(
    detector: Detector,
    state: TrafficState,
    items: Sequence[StoredItem],
    new: Sequence[StoredItem],
    alarms: AlarmBook,
) -> tuple[TrafficState, "_Traffic", Mapping[str, float]]:
    """Process a batch of new requests. Return the new state, the newest counted requests and the evidence for each
    feature.
    """
    kept = frozenset(state.kept)
    before = [item for item in items if item.id in kept]
    seen = [Seen(item.item.words, item.client) for item in items if item.id <= state.cursor][-SEEN:]
    requests_before, requests_new = requests_of(before, detector), requests_of(new, detector)
    advance = detector.advance(state.watch, requests_before, seen, requests_new)
    traffic = _Traffic(
        detector,
        [*before, *(new[place] for place in advance.kept)],
        requests_before.followed_by(requests_new.at(advance.kept)),
        advance.watch,
    )
    for event in advance.events:
        traffic.note(event, alarms)
    cursor = max([state.cursor, *(item.id for item in new)])
    newest = tuple(item.id for item in traffic.items[-MEMORY:])
    return TrafficState(cursor, newest, advance.watch), traffic, advance.strengths


def requests_of(items: Sequence[StoredItem], detector: Detector) -> Requests:
    """Convert stored items to the requests that the detector takes as input."""
    features = [item.item for item in items]
    return Requests(
        prompt_sample(features, detector.prompts),
        answer_sample(features, [item.logprob for item in items], detector.answers),
        [item.words for item in features],
        np.array([item.conversation for item in features], dtype=np.int64),
        np.array([item.started_at.timestamp() for item in features]),
        [item.client for item in items],
    )


def accepted_baseline(detector: Detector, state: TrafficState, items: Sequence[StoredItem]) -> Baseline:
    """Return a baseline for later requests, built from the requests counted since the newest alarm began.

    Raises:
        RefusedError: too few requests have been counted since the newest alarm began.
    """
    since = max(feature.alarm.since for feature in state.watch.features.values() if feature.alarm)
    count = min(state.watch.kept - since + 1, _MAX_ACCEPTED)
    ids = frozenset(state.kept[-count:])
    requests = requests_of([item for item in items if item.id in ids], detector)
    if requests.size < _MIN_ACCEPTED:
        raise RefusedError(
            f"only {requests.size} comparable requests have arrived since the newest drift alarm began",
            expected=f"at least {_MIN_ACCEPTED} requests",
            todo="repeat `svc drift MODEL --accept` once enough requests have arrived",
        )
    return Baseline(requests.prompts, requests.words, requests.answers)


@dataclass(frozen=True)
class _Traffic:
    """The most recent counted requests at the end of a check.

    Attributes:
        items, requests: the newest counted requests in order, as stored items and as detector input.
    """

    detector: Detector
    items: Sequence[StoredItem]
    requests: Requests
    watch: Watch

    @property
    def _first(self) -> int:
        """Number of requests that were counted before the first request in `items`."""
        return self.watch.kept - len(self.items)

    def note(self, event: Event, alarms: AlarmBook) -> None:
        """Start or end an alarm, depending on the event."""
        signal = self.detector.signals[event.feature]
        stop = event.position - self._first
        if event.alarm is None:
            alarms.end(signal, event.feature, self._time(stop - 1))
            return
        start = max(0, event.alarm.since - 1 - self._first)
        shown = max(start, stop - _SHOWN)
        live = self._sample(signal, shown, stop)
        alarms.begin(
            signal,
            self._line(event.feature, 1.0, live) or Line(event.feature, 0.0, 1.0, "-", "-"),
            since=self._time(start),
            called_at=self._time(stop - 1),
            examples=[self.items[shown + place].item.request_id for place in self._examples(event.feature, live)],
        )

    def report(self, signal: Signal, strengths: Mapping[str, float], alarms: AlarmBook) -> SignalReport:
        """Return the drift report for a signal."""
        size = min(_SHOWN, len(self.items))
        live = self._sample(signal, len(self.items) - size, len(self.items))
        features = [name for name, of in self.detector.signals.items() if of is signal and live.size >= _MIN_SHOWN]
        lines = {name: self._line(name, strengths[name], live) for name in features}
        status, why = _status(self.watch, size, compared=any(lines.values()))
        lasting = alarms.report(signal)
        return SignalReport(
            signal,
            Status.ALARM if lasting else status,
            why,
            items=self.watch.kept,
            window=size,
            lines=tuple(line for line in lines.values() if line),
            alarms=lasting,
            uncompared=tuple(name for name, line in lines.items() if not line),
            newest_at=self._time(-1) if self.items else None,
        )

    def _time(self, place: int) -> datetime:
        return self.items[place].item.started_at

    def _sample(self, signal: Signal, start: int, stop: int) -> Sample:
        sample = self.requests.prompts if signal is Signal.INPUT else self.requests.answers
        return sample.part(start, stop)

    def _reference(self, feature: str) -> Sample:
        of_input = self.detector.signals[feature] is Signal.INPUT
        return self.detector.prompts if of_input else self.detector.answers

    def _line(self, feature: str, evidence: float, live: Sample) -> Line | None:
        if feature == CLASSIFIER:
            return Line(feature, self.detector.classifier.separation(live), evidence, "", "")
        return feature_line(feature, evidence, self._reference(feature), live)

    def _examples(self, feature: str, live: Sample) -> list[int]:
        if feature == CLASSIFIER:
            return self.detector.classifier.most_typical(live, EXAMPLES)
        return most_moved(feature, self._reference(feature), live)


def _status(watch: Watch, shown: int, *, compared: bool) -> tuple[Status, str]:
    """Return the status of a signal that has no alarm, and the reason for the status.

    Args:
        shown: number of newest requests that the report describes.
    """
    if shown < _MIN_SHOWN:
        return Status.WAITING, f"fewer than {_MIN_SHOWN} comparable requests"
    if not compared:
        return Status.UNWATCHED, "none of the newest 100 requests has features to compare"
    newest = watch.newest_kept
    share = newest.count("1") / len(newest)
    if len(newest) < _MIN_SEEN or share >= _FEW_KEPT:
        return Status.STEADY, ""
    why = f"only {share:.0%} of the newest {len(newest)} requests are compared"
    why += ": the rest are near copies of earlier requests or exceed their client's usual share"
    return (Status.UNWATCHED if share < _NONE_KEPT else Status.STEADY), why
