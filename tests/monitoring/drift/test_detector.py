"""Tests the drift detector on streams, checked in pieces, with and without a change."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from monitoring.drift.budget import SIGNAL_SHARES, Signal
from monitoring.drift.dependence import MAX_LAG
from monitoring.drift.detector import MEMORY, SEEN, Advance, Baseline, Detector, Requests, Seen, Watch
from monitoring.drift.domain_classifier import CLASSIFIER
from monitoring.drift.evidence import Event
from svc.drift_reference.sample import Sample
from tests.monitoring.drift.synthetic_requests import baseline_of, draw_requests, without_answers

WATCH = TypeAdapter(Watch)
REFERENCE = draw_requests(1, 200)
DETECTOR = Detector(baseline_of(REFERENCE))
NOTHING = REFERENCE.at(np.zeros(0, dtype=np.intp))


class Stream:
    """A stream that is checked in pieces. The detector's state passes through JSON in between."""

    def __init__(self, detector: Detector = DETECTOR, nothing: Requests = NOTHING) -> None:
        self._detector = detector
        self._before, self._seen = nothing, list[Seen]()
        self.watch = Watch()
        self.events: list[Event] = []
        self.kept = 0

    def add(self, new: Requests) -> Advance:
        """Check further requests."""
        advance = self._detector.advance(self.watch, self._before, self._seen, new)
        both = self._before.followed_by(new.at(advance.kept))
        self._before = both.at(np.arange(max(0, both.size - MEMORY), both.size))
        self._seen = [*self._seen, *map(Seen, new.words, new.clients)][-SEEN:]
        self.watch = WATCH.validate_json(WATCH.dump_json(advance.watch))
        self.events += advance.events
        self.kept += len(advance.kept)
        return advance

    def add_in_pieces(self, requests: Requests, cuts: Sequence[int]) -> "Stream":
        """Check requests in pieces that end at the given positions."""
        edges = [0, *sorted(min(cut, requests.size) for cut in cuts), requests.size]
        for start, stop in pairwise(edges):
            self.add(requests.at(np.arange(start, stop)))
        return self


def first_alarm(before: Requests, after: Requests, detector: Detector = DETECTOR) -> tuple[str, int]:
    """Return the feature of the first alarm after a change, and the number of requests until that alarm."""
    stream = Stream(detector)
    stream.add(before)
    assert stream.events == []
    stream.add(after)
    event = next(event for event in stream.events if event.alarm)
    return event.feature, event.position - before.size


CHANGING = draw_requests(2, 250, repeats=0.2, templated=0.1, run=4).followed_by(
    draw_requests(3, 100, first=250, moved=0.8, cut=0.5)
)
AT_ONCE = Stream().add(CHANGING)


@pytest.mark.slow
@settings(max_examples=8)
@given(st.lists(st.integers(0, CHANGING.size), max_size=5))
def test_checking_a_request_stream_in_chunks_does_not_change_the_result(cuts: list[int]) -> None:
    stream = Stream().add_in_pieces(CHANGING, cuts)
    assert AT_ONCE.events
    assert (stream.watch, stream.events) == (AT_ONCE.watch, AT_ONCE.events)


@pytest.mark.slow
def test_checking_in_chunks_does_not_change_the_result_if_the_stream_exceeds_the_window() -> None:
    long = draw_requests(4, 750, repeats=0.05)
    long = long.followed_by(draw_requests(5, 300, first=750, run=8))  # the dependence grows
    long = long.followed_by(draw_requests(6, 60, first=1_050, moved=4.0))
    at_once, pieces = Stream(), Stream()
    at_once.add(long)
    pieces.add_in_pieces(long, [830, 831, 1_040])
    assert at_once.watch.kept > MEMORY + 100
    assert at_once.events
    assert (pieces.watch, pieces.events) == (at_once.watch, at_once.events)


@pytest.mark.slow
def test_detector_state_is_unchanged_if_there_are_no_new_requests() -> None:
    stream = Stream()
    stream.add(CHANGING)
    watch = stream.watch
    assert stream.add(NOTHING).events == []
    assert stream.watch == watch


def test_drift_detector_counts_each_repeated_request_only_once() -> None:
    stream = draw_requests(2, 40)
    twice = stream.at(np.repeat(np.arange(40), 2))
    advance = Stream().add(twice)
    assert advance.kept.tolist() == list(range(0, 80, 2))
    assert (advance.watch.kept, advance.watch.newest_kept) == (40, "10" * 40)


def test_drift_detector_state_records_which_recent_requests_were_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitoring.drift.detector.RARITY_REQUESTS", 50)
    requests = draw_requests(2, 45)
    stream = Stream()
    stream.add_in_pieces(requests.at(np.arange(44)).followed_by(requests), [30, 40])
    assert stream.watch.newest_kept == "1" * 5 + "0" * 44 + "1"


@pytest.mark.slow
def test_each_group_of_near_copies_in_the_reference_is_counted_as_one_item() -> None:
    repeating = REFERENCE.at(np.repeat(np.arange(200), np.where(np.arange(200) < 30, 20, 1)))
    detector = Detector(Baseline(repeating.prompts, repeating.words, REFERENCE.answers))
    assert detector.prompts.size == 200
    assert Stream(detector).add(CHANGING).events == AT_ONCE.events


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "features", "signal"),
    [
        pytest.param({"moved": 4.0}, {CLASSIFIER}, Signal.INPUT, id="topics"),
        pytest.param({"longer": 20.0}, {"characters"}, Signal.INPUT, id="long prompts"),
        pytest.param({"longer": 0.02}, {"characters"}, Signal.INPUT, id="short prompts"),
        pytest.param({"answers_longer": 20.0}, {"answer_tokens"}, Signal.OUTPUT, id="long answers"),
        pytest.param({"cut": 1.0}, {"finish_reason"}, Signal.OUTPUT, id="cut answers"),
    ],
)
def test_alarm_names_the_feature_within_12_requests_of_a_clear_shift(
    change: dict[str, float], features: set[str], signal: Signal
) -> None:
    feature, delay = first_alarm(draw_requests(2, 300), draw_requests(3, 40, first=300, **change))  # type: ignore[arg-type]
    assert feature in features
    assert DETECTOR.signals[feature] is signal
    assert delay <= 12


@pytest.mark.slow
def test_shift_present_from_the_first_request_causes_an_alarm_after_50_to_260_requests() -> None:
    feature, delay = first_alarm(draw_requests(2, 0), draw_requests(3, 400, longer=20.0))
    assert feature == "characters"
    assert 50 < delay < 260


@pytest.mark.slow
def test_alarm_starts_when_topics_change_slightly() -> None:
    stream = Stream()
    stream.add(draw_requests(2, 500))
    assert stream.events == []
    stream.add(draw_requests(3, 200, first=500, moved=0.7))
    assert {event.feature for event in stream.events} == {CLASSIFIER}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "repeats", "size"),
    [
        pytest.param(1, 0.0, 3_000, id="independent"),
        pytest.param(5, 0.0, 800, id="runs"),
        pytest.param(1, 0.3, 800, id="near copies"),
    ],
)
def test_requests_resembling_the_reference_cause_no_alarm(run: int, repeats: float, size: int) -> None:
    stream = Stream()
    stream.add_in_pieces(draw_requests(6, size, run=run, repeats=repeats), range(600, size, 600))
    assert stream.events == []
    assert stream.watch.kept > 0.6 * size


@pytest.mark.slow
def test_estimated_dependence_distance_is_close_to_the_number_of_consecutive_requests_on_one_topic() -> None:
    alone, runs = Stream(), Stream()
    alone.add(draw_requests(2, 300))
    runs.add(draw_requests(2, 300, run=6))
    assert alone.watch.dependence == 1
    assert 4 <= runs.watch.dependence <= 8


def test_maximum_dependence_distance_is_assumed_after_only_a_few_requests() -> None:
    assert Stream().add(draw_requests(2, 50)).watch.dependence == MAX_LAG


def no_answers(requests: Requests) -> Requests:
    return replace(requests, answers=Sample(requests.size))


@pytest.mark.slow
@pytest.mark.parametrize("strip", [no_answers, without_answers])
def test_changed_prompts_are_detected_when_neither_reference_nor_traffic_has_answers(
    strip: Callable[[Requests], Requests],
) -> None:
    detector = Detector(baseline_of(strip(REFERENCE)))
    assert set(detector.signals.values()) == {Signal.INPUT}
    stream = Stream(detector, strip(NOTHING))
    stream.add(strip(draw_requests(2, 300)).followed_by(strip(draw_requests(3, 30, first=300, moved=4.0))))
    assert next(event.feature for event in stream.events) == CLASSIFIER


@pytest.mark.slow
def test_missing_answer_features_cause_no_output_alarm() -> None:
    stream = Stream()
    stream.add(draw_requests(2, 100))
    before = stream.watch.features
    stream.add(without_answers(draw_requests(3, 100, first=100)))
    for feature in ("answer_tokens", "finish_reason"):
        assert stream.watch.features[feature].money == before[feature].money
    assert stream.events == []


def test_weights_of_all_drift_bets_add_up_to_the_budget_shares_of_the_watched_signals() -> None:
    with_answers, without = DETECTOR, Detector(baseline_of(no_answers(REFERENCE)))
    assert with_answers._weights.sum() == pytest.approx(SIGNAL_SHARES[Signal.INPUT] + SIGNAL_SHARES[Signal.OUTPUT])
    assert without._weights.sum() == pytest.approx(SIGNAL_SHARES[Signal.INPUT])
    assert (with_answers._weights > 0).all()


@pytest.mark.slow
def test_tiny_drift_reference_causes_no_alarm() -> None:
    for size in (1, 2, 3):
        detector = Detector(baseline_of(REFERENCE.at(np.arange(size))))
        assert Stream(detector).add(draw_requests(2, 300)).events == [], size


@pytest.mark.slow
def test_prompt_length_change_is_detected_even_if_prompt_embeddings_are_empty() -> None:
    def flat(requests: Requests) -> Requests:
        none = np.zeros((requests.size, 0))
        return replace(requests, prompts=replace(requests.prompts, views=(none, none)))

    stream = Stream(Detector(baseline_of(flat(REFERENCE))), flat(NOTHING))
    stream.add(flat(draw_requests(2, 300)).followed_by(flat(draw_requests(3, 30, longer=20.0))))
    assert [event.feature for event in stream.events] == ["characters"]


def test_selecting_and_concatenating_requests_preserves_their_order() -> None:
    some = CHANGING.at(np.array([3, 1]))
    both = some.followed_by(CHANGING.at(np.array([2])))
    assert both.times.tolist() == [CHANGING.times[place] for place in (3, 1, 2)]
    assert [words.tolist() for words in both.words] == [CHANGING.words[place].tolist() for place in (3, 1, 2)]
    assert both.size == 3


def test_detector_compares_only_features_present_in_its_baseline() -> None:
    baseline = Baseline(REFERENCE.prompts, REFERENCE.words, REFERENCE.answers)
    assert set(Detector(baseline).signals) == {
        CLASSIFIER,
        *("characters", "symbols", "language", "answer_tokens", "finish_reason"),
    }
