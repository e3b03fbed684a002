"""Tests replays of streams from a small prompt pool: indexes, delays and time in alarm."""

import numpy as np
import pytest

from benchmarks.drift.prompts import Pool
from benchmarks.drift.replay import Replay, replay
from benchmarks.drift.streams import (
    CHANGE_AFTER,
    WITHOUT_CHANGE,
    Change,
    conversations,
    draw_reference,
    independent,
    runs,
    sessions,
)
from monitoring.drift.detector import Detector
from monitoring.drift.evidence import Event, FeatureAlarm
from svc.drift_reference.sample import Sample

ALIKE, CHANGED = 600, 50
SECTIONS = ("net", "doc", "libs", "java", "games", "admin", "devel", "sound", "x11", "python", "science", "javascript")


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Return a pool of random vectors and words in which changed prompts are longer than all other prompts."""
    generator = np.random.default_rng(0)
    count = ALIKE + CHANGED + 19 * ALIKE
    length = np.concatenate([generator.normal(100, 10, ALIKE), np.full(CHANGED, 900.0), np.full(19 * ALIKE, 100.0)])
    return Pool(
        Sample(count, {"characters": length}, {}, tuple(generator.normal(size=(count, axes)) for axes in (4, 2))),
        Sample(count),
        [np.sort(generator.integers(0, 2**30, 20)).astype(np.int32) for _ in range(count)],
        [SECTIONS[place % 12] for place in range(count)],
        {"alike": np.arange(ALIKE), "strong": np.arange(ALIKE, ALIKE + CHANGED)},
        np.arange(ALIKE + CHANGED, count).reshape(ALIKE, 19),
    )


def event(position: int, *, feature: str = "characters", begins: bool) -> Event:
    return Event(position, feature, FeatureAlarm(position - 3, position) if begins else None)


def test_alarm_position_counts_all_requests_including_skipped_near_copies() -> None:
    result = Replay(kept=[0, 3, 4, 9], events=[event(3, begins=True)])
    assert result.place(result.alarms[0]) == 4


def test_time_in_alarm_counts_overlapping_alarms_once() -> None:
    one, other = "characters", "language"
    events = [
        event(10, feature=one, begins=True),
        event(20, feature=other, begins=True),
        event(30, feature=one, begins=False),
        event(40, feature=other, begins=False),
    ]
    assert Replay(list(range(100)), events).in_alarm(100) == 30


def test_time_in_alarm_extends_to_end_of_stream_if_alarm_stays_active() -> None:
    assert Replay(list(range(100)), [event(91, begins=True)]).in_alarm(100) == 10


@pytest.mark.slow
def test_change_is_never_detected_before_it_begins(pool: Pool) -> None:
    reference, live, generator = draw_reference(pool, 1)
    stream = Change("strong", 100).make(pool, live, generator)
    result = replay(pool, Detector(pool.baseline(reference)), stream)
    assert 0 <= result.place(result.alarms[0]) - CHANGE_AFTER < 10


def test_request_stream_has_the_requested_length_and_excludes_reference_prompts(pool: Pool) -> None:
    for name, make in WITHOUT_CHANGE.items():
        reference, live, generator = draw_reference(pool, 2)
        stream = make(pool, live, generator, 500)
        originals = stream.prompts[stream.prompts < ALIKE]
        assert len(stream.prompts) == 500, name
        assert set(originals) <= set(live) - set(reference), name


def test_each_run_contains_distinct_prompts_from_one_topic(pool: Pool) -> None:
    _, live, generator = draw_reference(pool, 3)
    first = runs(5)(pool, live, generator, 100).prompts[:5]
    assert len({pool.sections[place] for place in first}) == 1
    assert len(set(first)) == 5


def test_each_session_consists_of_rephrasings_of_one_prompt(pool: Pool) -> None:
    _, live, generator = draw_reference(pool, 4)
    first, *others = sessions(5, 1)(pool, live, generator, 5).prompts
    assert set(others) <= set(pool.rephrased[first])


def test_conversation_turns_share_one_conversation_id(pool: Pool) -> None:
    _, live, generator = draw_reference(pool, 5)
    stream = conversations(5, 3)(pool, live, generator, 300)
    assert stream.conversations is not None
    _, sizes = np.unique(stream.conversations, return_counts=True)
    assert max(sizes) == 5


def test_replay_is_reproducible_with_the_same_seed(pool: Pool) -> None:
    streams = [independent(pool, *draw_reference(pool, 6)[1:], 50).prompts for _ in range(2)]
    assert (streams[0] == streams[1]).all()
