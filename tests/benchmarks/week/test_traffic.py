"""Tests that the simulated clients follow the week's timetable and depend only on the seed."""

from itertools import islice

import pytest

from benchmarks.week.events import changes
from benchmarks.week.timetable import CRASHES_AT, MAIN, SHIFT_AT, SIDE, WAKES, at, moment
from benchmarks.week.traffic import Arrival, Clients, read_prompts
from serving.protocols.error_code import ErrorCode

pytestmark = pytest.mark.slow

DAY = 1_440


@pytest.fixture(scope="module")
def monday() -> list[Arrival]:
    return [arrival for minute in islice(Clients(1).minutes(), DAY) for arrival in minute]


def _of(arrivals: list[Arrival], model: str) -> list[Arrival]:
    return [arrival for arrival in arrivals if arrival.model == model]


def test_same_seed_generates_the_same_requests() -> None:
    first, second, other = (list(islice(Clients(seed).minutes(), 60)) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_each_model_gets_the_requests_in_its_schedule(monday: list[Arrival]) -> None:
    assert len(_of(monday, MAIN)) == pytest.approx(5_000, rel=0.1)
    assert len(_of(monday, SIDE)) == pytest.approx(1_000, rel=0.1)
    assert {model: len(_of(monday, model)) for model in WAKES} == {"legal": 25, "quarterly": 0}


def test_night_request_rate_is_one_fifth_of_day_rate(monday: list[Arrival]) -> None:
    by_day = [arrival for arrival in _of(monday, SIDE) if at("1 07:00") <= arrival.at < at("1 21:00")]
    at_night = len(_of(monday, SIDE)) - len(by_day)
    assert (at_night / 10) / (len(by_day) / 14) == pytest.approx(0.2, rel=0.25)


def test_about_half_of_prompts_are_near_copies_or_from_the_heavy_client(monday: list[Arrival]) -> None:
    known = {text for texts in read_prompts().by_section.values() for text in texts}
    copies = [arrival for arrival in _of(monday, MAIN) if arrival.prompt not in known]
    heavy = [arrival for arrival in _of(monday, MAIN) if arrival.key_id == "batch"]
    assert (len(copies) + len(heavy)) / len(_of(monday, MAIN)) == pytest.approx(0.42, abs=0.04)


def test_only_the_heavy_client_is_rate_limited(monday: list[Arrival]) -> None:
    limited = [arrival for arrival in monday if arrival.reason is ErrorCode.RATE_LIMIT_EXCEEDED]
    assert limited
    assert {arrival.key_id for arrival in limited} == {"batch"}


def test_generated_requests_are_ordered_by_time(monday: list[Arrival]) -> None:
    assert [arrival.at for arrival in monday] == sorted(arrival.at for arrival in monday)


def test_new_kind_of_prompt_is_absent_before_the_shift_and_makes_up_a_fifth_of_prompts_after_it() -> None:
    known = set(read_prompts().shifted)
    clients = Clients(1)
    before, after = (
        [clients.draw(now)[0] for _ in range(2_000)]  # the whole week takes ten seconds
        for now in (SHIFT_AT - 60, SHIFT_AT)
    )
    assert not known & set(before)
    # Half of the new prompts are rephrased.
    assert sum(text in known for text in after) / len(after) == pytest.approx(0.1, abs=0.02)


def test_crashing_engine_restarts_about_twenty_times_in_25_minutes() -> None:
    restarts = [change for change in changes() if change.restarted]
    assert {change.model for change in restarts} == {SIDE}
    assert [moment(restarts[0].at), moment(restarts[-1].at)] == ["3 11:00", "3 11:26"]
    assert len(restarts) == pytest.approx(20, abs=3)
    assert restarts[0].at - CRASHES_AT == 1
