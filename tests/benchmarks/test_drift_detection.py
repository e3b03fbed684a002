"""The benchmark replays what it says, and what it shows for the shipped streams holds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from benchmarks import drift_detection
from benchmarks.drift_detection import (
    CALIBRATED,
    CUSTOMARY,
    METHODS,
    STREAMS,
    TASK,
    Outcome,
    StabilityTest,
    Streams,
    alarms,
    delay,
    delays,
    false_alarms,
    quantile,
    rate,
    read_streams,
    stability_threshold,
)
from monitoring.drift.detector import Watch
from monitoring.drift.two_sample.univariate import number_stability
from svc.drift_reference.sample import Floats, Sample

pytestmark = pytest.mark.slow

SEEDS = range(3)
LINES = 3
"""One of so many lines is taken, to save time."""
KOLMOGOROV, LENGTH = "KS, five features, p < 0.05", "KS, length, p < 0.05"


def upto(stop: int) -> Floats:
    return np.arange(stop, dtype=np.float64)


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Streams:
    """The shipped ones, shortened."""
    folder = tmp_path_factory.mktemp("streams")

    def shortened(path: Path) -> Path:
        lines = path.read_text("utf-8").splitlines(keepends=True)
        (folder / path.name).write_text("".join(lines[::LINES]), "utf-8")
        return folder / path.name

    return read_streams(
        shortened(TASK / "train.jsonl"),
        TASK / "heldout.jsonl",
        shortened(STREAMS / "in_distribution.jsonl"),
        shortened(STREAMS / "shifted.jsonl"),
    )


def test_the_streams_have_what_is_replayed(streams: Streams) -> None:
    assert (streams.reference.size, streams.alike.size) == (200, 334)
    assert {grade: sample.size > 100 for grade, sample in streams.shifted.items()} == {
        "mild": True,
        "medium": True,
        "strong": True,
    }


@pytest.mark.parametrize(("grade", "most"), [("strong", 20), ("medium", 20), ("mild", 100)])
def test_a_shift_is_found_within_a_few_requests(streams: Streams, grade: str, most: int) -> None:
    found = [delay(streams, "ours", grade, seed) for seed in SEEDS]
    assert all(requests is not None and 0 < requests <= most for requests in found)


@pytest.mark.parametrize("redraw", [False, True])
def test_prompts_that_are_alike_give_no_alarm(streams: Streams, redraw: bool) -> None:
    assert false_alarms(streams, "ours", 0, redraw=redraw) == (0, streams.alike.size)


def test_the_same_seed_replays_the_same(streams: Streams) -> None:
    once = [delay(streams, KOLMOGOROV, "strong", seed) for seed in range(8)]
    assert once == [delay(streams, KOLMOGOROV, "strong", seed) for seed in range(8)]
    assert len(set(once)) > 1


def made_up(*, alike: float, shifted: float) -> Streams:
    """Prompts of the held-out ones' lengths, but for what is added."""
    lengths = upto(300)
    reference, same, other = (Sample(300, {"characters": lengths + more}) for more in (0.5, alike, shifted))
    return Streams(reference, same, {"far": other})


def test_the_delay_counts_from_the_shift() -> None:
    # It compares every hundredth request, and overlooks a few shifted ones among a hundred.
    found = [delay(made_up(alike=0, shifted=1000), LENGTH, "far", seed) for seed in range(20)]
    assert all(requests is not None and 0 < requests <= 130 for requests in found)
    assert len(set(found)) > 10


def test_an_alarm_before_the_shift_does_not_find_it() -> None:
    assert delay(made_up(alike=1000, shifted=2000), LENGTH, "far", 0) is None


def test_where_nothing_has_shifted_nothing_is_found() -> None:
    assert delay(made_up(alike=0, shifted=0), LENGTH, "far", 0) is None


def test_replayed_in_pieces_the_alarms_are_those_of_one_piece(streams: Streams) -> None:
    stream = streams.alike.part(0, 150).followed_by(streams.shifted["strong"])
    method = METHODS[KOLMOGOROV]
    _, events = method.detector(streams.reference, method.features).advance(Watch(), stream, stream.size)
    in_pieces = list(alarms(method.detector(streams.reference, method.features), stream))
    assert in_pieces and in_pieces == [event.position for event in events if event.alarm]


@pytest.mark.parametrize("method", CUSTOMARY, ids=lambda method: method.name)
def test_a_customary_method_compares_batches_of_a_hundred_at_its_own_level(
    streams: Streams, method: drift_detection.Method
) -> None:
    windows = method.detector(streams.reference, method.features).windows
    assert [(window.size, window.every, window.alpha(1e-5)) for window in windows] == [(100, 100, 0.05)]


@pytest.mark.parametrize("method", CALIBRATED[:3], ids=lambda method: method.name)
def test_a_calibrated_method_spends_the_signals_budget(streams: Streams, method: drift_detection.Method) -> None:
    windows = method.detector(streams.reference, method.features).windows
    assert sum(window.alpha(6e-6) / window.every for window in windows) == pytest.approx(6e-6)


@pytest.mark.parametrize(("size", "calls"), [(50, True), (100, False)])
def test_stability_calls_beyond_the_threshold_of_the_window_only(size: int, calls: bool) -> None:
    # Live values lie in the lower half: the index is near 0.7 log 3.
    reference, live = upto(200), upto(200)[: 2 * size : 2]
    found = number_stability(reference, live).index
    test = StabilityTest("length", reference, {50: found - 0.01, 100: found + 0.01})
    assert (test.p_value(Sample(size, {"length": live}), 1e-5, ()) <= 1e-5) is calls


def test_without_a_threshold_of_its_own_a_window_has_the_customary_one() -> None:
    reference = upto(200)
    test = StabilityTest("length", reference, {})
    found = [test.p_value(Sample(100, {"length": live}), 0.05, ()) for live in (reference[::2], reference[100:])]
    assert found == [1.0, 0.0]


def test_the_threshold_is_exceeded_as_rarely_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_detection, "_SIMULATED", 200_000)
    level, repeats, generator = 0.02, 500, np.random.default_rng(1)
    threshold = stability_threshold(180, 40, level)
    exceeded = sum(
        number_stability(generator.normal(size=180), generator.normal(size=40)).index > threshold
        for _ in range(repeats)
    )
    low, high = binom.ppf([0.0001, 0.9999], repeats, level)
    assert low <= exceeded <= high


@pytest.mark.parametrize(
    ("outcomes", "cells"),
    [
        ([7], "7 / 7"),
        (list(range(1, 101)), "50 / 95"),
        ([10, None, 30], "30 / never"),
        ([None, None, 5], "never / never"),
        ([5] * 96 + [None] * 4, "5 / 5"),
    ],
)
def test_of_delays_the_median_and_the_95th_percentile_are_shown(outcomes: Sequence[Outcome], cells: str) -> None:
    assert delays(outcomes) == cells


def test_a_stream_without_an_alarm_is_longer_than_any() -> None:
    assert quantile([None, 1000], 0.5) == 1000
    assert quantile([None, 1000], 0.95) == np.inf


def test_false_alarms_are_counted_in_ten_thousand_requests() -> None:
    assert rate([(1, 1000), (0, 1000), (2, 500)]) == "12.00 (3 in 2,500)"
