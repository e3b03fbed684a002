"""Alarms begin and end where they must, and a stream may come in any pieces."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from monitoring.drift.two_sample.alpha_spending import Window

from monitoring.drift.detector import Detector, Event, Finding, Watch
from svc.drift_reference.sample import Floats, Sample

MARKED = 1.0
SMALL = (Window(size=2, every=2, share=0.25), Window(size=4, every=3, share=0.25), Window(size=7, every=5, share=0.5))
streams = st.lists(st.sampled_from([0.0, 0.0, 0.0, MARKED]), max_size=120)
chunks = st.lists(st.integers(0, 30), max_size=20)


@dataclass(frozen=True)
class Stub:
    """Calls what its rule calls, and writes down where it was asked."""

    rule: Callable[[Floats], bool]
    name: str = "stub"
    share: float = 1.0
    asked: list[tuple[Floats, float, tuple[int, ...]]] = field(default_factory=list)

    def p_value(self, live: Sample, alpha: float, seed: Sequence[int]) -> float:
        self.asked.append((live.numbers["place"], alpha, tuple(seed)))
        return 0.0 if self.rule(live.numbers["value"]) else 1.0


def has_mark(values: Floats) -> bool:
    return bool((values == MARKED).any())


def half_marked(values: Floats) -> bool:
    return bool((values == MARKED).mean() >= 0.5)


def always(values: Floats) -> bool:
    return True


def never(values: Floats) -> bool:
    return False


def stream(values: Sequence[float]) -> Sample:
    """Items that know their place, from 1."""
    return Sample(
        len(values), {"value": np.array(values, dtype=float), "place": np.arange(1, len(values) + 1, dtype=np.float64)}
    )


def marked(size: int, *places: int) -> Sample:
    """Items of which these are marked, counted from 1."""
    return stream([MARKED if place in places else 0.0 for place in range(1, size + 1)])


def run(items: Sample, *tests: Stub, reference: int = 200) -> list[Event]:
    return Detector(tests, reference, 1.0).advance(Watch(), items, items.size)[1]


def begins(events: Sequence[Event]) -> list[int]:
    return [event.position for event in events if event.alarm]


def ends(events: Sequence[Event]) -> list[int]:
    return [event.position for event in events if not event.alarm]


def test_where_nothing_is_significant_there_is_no_alarm() -> None:
    assert run(marked(300), Stub(never)) == []


def test_an_alarm_begins_at_the_first_comparison_that_is_significant() -> None:
    assert begins(run(marked(60, 42), Stub(has_mark))) == [45]


def test_no_comparison_is_made_before_a_window_is_full() -> None:
    assert begins(run(marked(30, 1), Stub(always))) == [10]


def test_an_alarm_says_in_which_window_it_was_found() -> None:
    event = run(marked(60, 12), Stub(lambda values: len(values) == 30))[0]
    assert event.alarm and (event.position, event.alarm.size) == (30, 30)


def test_the_smallest_window_that_is_significant_says_since_when() -> None:
    event = run(marked(60, 42), Stub(has_mark))[0]
    assert event.alarm and event.alarm.size == 10
    assert [finding.size for finding in event.alarm.findings] == [10, 30]


def test_an_alarm_names_only_the_tests_that_called_it() -> None:
    event = run(marked(60, 42), Stub(never, "calm", 0.5), Stub(has_mark, "moved", 0.5))[0]
    assert event.alarm and {finding.test for finding in event.alarm.findings} == {"moved"}


def test_a_test_is_significant_up_to_its_level_and_not_beyond() -> None:
    at, beyond = (Finding("test", 10, p, 1e-5) for p in (1e-5, 1.0001e-5))
    assert at.significant and not beyond.significant


def test_the_level_of_a_test_is_its_share_of_the_windows() -> None:
    whole, third = Stub(never), Stub(never, share=1 / 3)
    run(marked(100), whole), run(marked(100), third)
    assert [alpha for _, alpha, _ in third.asked] == pytest.approx([alpha / 3 for _, alpha, _ in whole.asked])


def test_an_alarm_that_lasts_is_one_event() -> None:
    assert len(run(marked(500, *range(101, 501)), Stub(has_mark))) == 1


def test_an_alarm_ends_when_the_newest_items_show_nothing_any_more() -> None:
    # The mark leaves the newest hundred after 142; it is looked at every ten.
    events = run(marked(300, 42), Stub(has_mark))
    assert (begins(events), ends(events)) == ([45], [150])


def test_an_alarm_lasts_while_every_new_item_is_shifted() -> None:
    events = run(marked(300, *range(101, 301)), Stub(half_marked))
    assert len(events) == 1


def test_an_alarm_ends_by_a_level_that_its_tests_share() -> None:
    one, other = Stub(lambda values: len(values) == 10), Stub(never)
    run(marked(25), one, other)
    assert other.asked[-1][1] == pytest.approx(0.05 / 2)


def test_after_an_alarm_another_can_begin() -> None:
    events = run(marked(400, 42, 242), Stub(has_mark))
    assert (begins(events), ends(events)) == ([45, 245], [150, 350])


@given(streams)
def test_begin_and_end_alternate(values: list[float]) -> None:
    events = small(Stub(has_mark)).advance(Watch(), stream(values), len(values))[1]
    assert [bool(event.alarm) for event in events] == [place % 2 == 0 for place in range(len(events))]


@given(streams)
def test_no_alarm_is_called_by_items_from_before_the_last_alarms_end(values: list[float]) -> None:
    test = Stub(has_mark)
    events = small(test).advance(Watch(), stream(values), len(values))[1]
    last = {end: [begin for begin in begins(events) if begin > end] for end in ends(events)}
    for end, later in last.items():
        looks = [places for places, alpha, _ in test.asked if alpha < 0.01 and places[-1] > end]
        assert all(places[0] > end for places in looks)
        assert all(begin >= end + SMALL[0].size for begin in later)


@given(streams, st.integers(1, 7))
def test_every_comparison_is_made_at_its_place_only(values: list[float], rest: int) -> None:
    test = Stub(never)
    small(test).advance(Watch(), stream(values), len(values))
    made = {(int(places[-1]), len(places)) for places, *_ in test.asked}
    due = {
        (place, window.size)
        for window in SMALL
        for place in range(window.size, len(values) + 1)
        if place % window.every == 0
    }
    assert made == due


@given(streams, chunks)
def test_a_stream_in_pieces_gives_what_it_gives_at_once(values: list[float], sizes: list[int]) -> None:
    items = stream(values)
    at_once = small(Stub(half_marked)).advance(Watch(), items, items.size)
    assert in_pieces(small(Stub(half_marked)), items, sizes) == at_once


@given(streams, chunks)
def test_a_stream_in_pieces_is_asked_about_the_same_windows_with_the_same_seeds(
    values: list[float], sizes: list[int]
) -> None:
    items, one, other = stream(values), Stub(half_marked), Stub(half_marked)
    small(one).advance(Watch(), items, items.size)
    in_pieces(small(other), items, sizes)
    assert [(list(places), *rest) for places, *rest in one.asked] == [
        (list(places), *rest) for places, *rest in other.asked
    ]


def test_the_windows_of_the_server_may_come_in_pieces_too() -> None:
    items = marked(700, *range(150, 260), *range(400, 470))
    at_once = Detector([Stub(half_marked)], 200, 1.0).advance(Watch(), items, items.size)
    assert at_once[1]
    assert in_pieces(Detector([Stub(half_marked)], 200, 1.0), items, [1, 7, 0, 25, 250, 33]) == at_once


def test_nothing_new_changes_nothing() -> None:
    watch = Watch(position=45, fresh=45)
    assert Detector([Stub(always)], 200, 1.0).advance(watch, marked(45), 0) == (watch, [])


@pytest.mark.parametrize("reference", [0, 1, 5, 19])
def test_a_reference_that_is_too_small_never_alarms(reference: int) -> None:
    watch, events = Detector([Stub(always)], reference, 1.0).advance(Watch(), marked(300), 300)
    assert events == []
    assert watch.position == 300


def test_a_smaller_reference_needs_a_shorter_memory() -> None:
    assert [Detector([Stub(never)], size, 1.0).memory for size in (19, 20, 60, 200)] == [0, 10, 30, 100]


def test_shuffles_differ_from_place_to_place_and_from_stream_to_stream() -> None:
    one, other = Stub(never), Stub(never)
    for test, number in ((one, 1), (other, 2)):
        Detector([test], 200, 1.0, stream=(number,)).advance(Watch(), marked(200), 200)
    seeds = [seed for test in (one, other) for *_, seed in test.asked]
    assert len(set(seeds)) == len(seeds)


def small(test: Stub) -> Detector:
    return Detector([test], 200, 1.0, windows=SMALL)


def in_pieces(detector: Detector, items: Sample, sizes: Sequence[int]) -> tuple[Watch, list[Event]]:
    """Hands over the stream in pieces, each with no more before it than the detector needs."""
    watch, events = Watch(), list[Event]()
    for size in [*sizes, items.size]:
        stop = min(items.size, watch.position + size)
        part = items.part(max(0, watch.position - detector.memory), stop)
        watch, found = detector.advance(watch, part, stop - watch.position)
        events += found
    return watch, events
