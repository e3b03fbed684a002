"""Tests that an alarm starts when ratings get worse, in any order and by any user, but not when better."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter
from sqlalchemy import Engine as Store

from monitoring.drift import ratings
from monitoring.drift.alarms import AlarmBook
from monitoring.drift.bets import hit_table, upper_limit
from monitoring.drift.budget import Signal
from monitoring.drift.evidence import HIT
from monitoring.drift.ratings import (
    RatingState,
    accept_ratings,
    check_ratings,
    one_a_day,
    rating_bets,
    rating_sample,
)
from monitoring.drift.report import SignalReport, Status
from svc.errors import RefusedError
from svc.store.answered import RatedAnswer
from svc.version import Format, Target, VersionId
from tests.new_store import new_store

STATE = TypeAdapter(RatingState)
TARGET = Target(VersionId("triage", 1), Format.GPTQ)
NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)


def rated(bad: Sequence[bool], *, first: int = 0, person: str = "", corrected: bool = False) -> list[RatedAnswer]:
    """Return ratings, one per minute.

    Args:
        first: position of the first rating.
    """
    return [
        RatedAnswer(number, f"req-{number}", person, NOON + number * MINUTE, is_bad, corrected and is_bad)
        for number, is_bad in enumerate(bad, first)
    ]


def drawn(seed: int, size: int, share: float) -> list[bool]:
    return [bool(one) for one in np.random.default_rng(seed).random(size) < share]


def exactly(bad: int, size: int) -> list[bool]:
    return [place % (size // bad) == 0 if bad else False for place in range(size)]


@dataclass
class People:
    """The stored ratings and the checks run on them.

    Attributes:
        given: ratings of the version.
        earlier: ratings of previous versions.
    """

    store: Store
    given: list[RatedAnswer]
    earlier: list[RatedAnswer]
    alarms: AlarmBook
    state: RatingState

    def check(self, now: datetime | None = None) -> SignalReport:
        """Run a check and store its state as JSON."""
        moment = now or max((rating.given_at for rating in self.given), default=NOON)
        state, report = check_ratings(self.store, TARGET, self.state, moment, self.alarms)
        self.state = STATE.validate_json(STATE.dump_json(state))
        return report

    def give(self, *bad: bool, corrected: bool = False) -> None:
        self.given += rated(bad, first=len(self.given), corrected=corrected)

    def forget(self) -> None:
        """Start over without any ratings of the version."""
        self.given, self.state, self.alarms = [], RatingState(), AlarmBook(self.store, TARGET)

    @property
    def lasting(self) -> list[str]:
        return list(self.alarms.lasting(Signal.PEOPLE))


@pytest.fixture
def people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> People:
    """Return 100 earlier ratings, 6 of them bad, with no ratings of the version yet."""
    store = new_store(tmp_path / "home")
    people = People(store, [], rated(exactly(6, 96) + [False] * 4), AlarmBook(store, TARGET), RatingState())
    monkeypatch.setattr(ratings, "read_ratings", lambda *_, newest: people.given[-newest:])
    monkeypatch.setattr(ratings, "read_earlier_ratings", lambda *_, newest: people.earlier[-newest:])
    return people


def test_only_the_first_rating_per_user_and_day_is_counted() -> None:
    first, second, other = rated([True, False, False], person="ada")
    next_day = RatedAnswer(9, "req-9", "ada", NOON + DAY, bad=False, corrected=False)
    somebody = RatedAnswer(10, "req-10", "bob", NOON, bad=False, corrected=False)
    assert one_a_day([first, second, somebody, other, next_day]) == [first, somebody, next_day]


def test_all_ratings_are_counted_if_requests_name_no_user() -> None:
    assert one_a_day(rated([True] * 5)) == rated([True] * 5)


def test_rating_day_starts_at_midnight_utc() -> None:
    late = RatedAnswer(1, "req-1", "ada", datetime(2026, 11, 1, 23, 59, tzinfo=UTC), bad=True, corrected=False)
    early = RatedAnswer(2, "req-2", "ada", datetime(2026, 11, 2, 0, 0, tzinfo=UTC), bad=True, corrected=False)
    assert one_a_day([late, early]) == [late, early]


@pytest.mark.slow
def test_alarm_starts_within_60_ratings_in_18_of_20_trials_when_bad_ratings_rise_to_50_percent(
    people: People,
) -> None:
    seen = 0
    for seed in range(20):
        people.forget()
        people.give(*drawn(seed, 60, 0.06))
        assert people.check().status is Status.STEADY
        people.give(*drawn(seed + 50, 60, 0.5))
        seen += people.check().status is Status.ALARM
    assert seen >= 18


def test_alarm_starts_within_60_ratings_when_bad_ratings_rise_from_6_to_50_percent(people: People) -> None:
    people.give(*[False] * 20, *exactly(30, 60))
    assert people.check().status is Status.ALARM
    assert people.lasting == ["bad_ratings"]


def test_alarm_starts_when_the_share_of_corrected_answers_increases(people: People) -> None:
    people.give(*[True, False] * 30, corrected=True)
    people.check()
    assert set(people.lasting) == {"bad_ratings", "corrections"}


def test_fewer_bad_ratings_cause_no_alarm(people: People) -> None:
    people.earlier = rated(exactly(50, 100))
    people.give(*[False] * 500)
    assert people.check().status is Status.STEADY
    assert people.alarms.changed == []


@pytest.mark.slow
def test_ratings_resembling_earlier_ratings_cause_no_alarm(people: People) -> None:
    for seed in range(5):
        people.forget()
        people.give(*drawn(seed, 1_000, 0.06))
        assert people.check().status is Status.STEADY, seed


@pytest.mark.slow
def test_five_identical_ratings_from_every_user_cause_no_drift_alarm(people: People) -> None:
    for seed in range(5):
        people.forget()
        for number, bad in enumerate(drawn(seed, 200, 0.06)):
            people.given += rated([bad] * 5, first=5 * number, person=f"person {number}")
        assert people.check().status is Status.STEADY, seed
        assert people.state.position == 200


def test_many_bad_ratings_from_one_user_cause_no_alarm(people: People) -> None:
    people.given = rated([True] * 200, person="ada")
    assert people.check().status is Status.STEADY
    assert people.state.position == 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 33])
def test_checking_ratings_in_chunks_does_not_change_the_result(people: People, size: int, tmp_path: Path) -> None:
    bad = [*drawn(1, 130, 0.06), *drawn(2, 60, 0.6), *drawn(3, 330, 0.03)]
    for start in range(0, len(bad), size):
        people.give(*bad[start : start + size])
        people.check()
    in_pieces, alarms = people.state, people.alarms.changed
    people.state, people.alarms = RatingState(), AlarmBook(people.store, TARGET)
    people.check()
    assert alarms[0].ended_at is not None
    assert (in_pieces, alarms) == (people.state, people.alarms.changed)


def test_rating_alarm_reports_when_bad_ratings_began_and_ends_after_good_ratings(people: People) -> None:
    people.give(*[False] * 80, *[True] * 20)
    people.check()
    alarm = people.alarms.lasting(Signal.PEOPLE)["bad_ratings"]
    assert alarm.since == NOON + 80 * MINUTE
    assert alarm.since < alarm.called_at <= NOON + 90 * MINUTE
    assert alarm.examples and set(alarm.examples) <= {f"req-{number}" for number in range(80, 100)}
    people.give(*[False] * 210)
    assert people.check().status is Status.STEADY
    ended = people.alarms.changed[0].ended_at
    assert ended and NOON + 290 * MINUTE <= ended < NOON + 300 * MINUTE  # 200 after the last sign


def test_first_100_ratings_are_the_reference_if_there_are_no_earlier_ratings(people: People) -> None:
    people.earlier = []
    people.give(*exactly(9, 99))
    assert people.check().status is Status.WAITING
    people.give(False)
    report = people.check()
    assert (report.status, report.items, len(people.state.base)) == (Status.WAITING, 0, 100)
    people.give(*[True] * 20)
    assert people.check().status is Status.ALARM
    assert people.state.position == 20


def test_reference_stays_the_same_when_older_ratings_arrive_late(people: People) -> None:
    people.give(False)
    people.check()
    people.earlier += rated([True] * 300)
    people.give(False)
    people.check()
    assert sum(bad for bad, _ in people.state.base) == 6


def test_checking_without_new_ratings_leaves_the_state_unchanged(people: People) -> None:
    people.give(*[False] * 80, *[True] * 20)
    people.check()
    state, changed = people.state, list(people.alarms.changed)
    people.check()
    assert (people.state, people.alarms.changed) == (state, changed)


def test_report_states_that_no_answer_was_rated(people: People) -> None:
    report = people.check()
    assert (report.status, report.items, report.window, report.lines) == (Status.WAITING, 0, 0, ())
    assert report.newest_at is None


def test_alarm_about_ratings_ends_if_the_reference_ratings_are_lost(people: People) -> None:
    """An example is a change of the state's format for a version without earlier ratings."""
    people.give(*[False] * 20, *[True] * 20)
    assert people.check().status is Status.ALARM
    people.state, people.earlier, people.given = RatingState(), [], people.given[-20:]
    assert people.check().status is Status.WAITING
    assert people.alarms.lasting(Signal.PEOPLE) == {}


def test_rating_check_succeeds_after_all_ratings_were_deleted(people: People) -> None:
    people.give(*[False] * 20)
    people.check()
    people.given = []
    report = people.check()
    assert (report.status, report.items, report.window) == (Status.STEADY, 20, 0)


def test_ratings_are_counted_even_if_an_earlier_rating_has_a_future_timestamp(people: People) -> None:
    people.give(*[False] * 10)
    ahead = RatedAnswer(999, "req-999", "", NOON + 30 * DAY, bad=False, corrected=False)
    now = people.given[-1].given_at
    people.given.append(ahead)
    people.check(now)
    people.given = [*people.given[:-1], *rated([True] * 20, first=20), ahead]
    assert people.check(NOON + 40 * MINUTE).status is Status.ALARM
    assert people.state.position == 31


def test_ratings_accepted_as_normal_become_the_reference_for_later_ratings(people: People) -> None:
    people.give(*[False] * 20, *exactly(30, 60))
    people.check()
    since = people.alarms.lasting(Signal.PEOPLE)["bad_ratings"].since
    people.state = accept_ratings(people.store, TARGET, people.state, since)
    people.alarms.end_all(Signal.PEOPLE, NOON)
    people.give(*drawn(1, 200, 0.5))
    assert people.check().status is Status.STEADY


def test_ratings_before_the_accepted_change_are_not_part_of_the_new_reference(people: People) -> None:
    people.give(*[False] * 20, *[True] * 50)
    state = accept_ratings(people.store, TARGET, people.state, NOON + 20 * MINUTE)
    assert state.base == ((True, False),) * 50


def test_rating_drift_cannot_be_accepted_with_fewer_than_50_ratings(people: People) -> None:
    people.give(*[True] * 49)
    with pytest.raises(RefusedError, match="only 49 ratings"):
        accept_ratings(people.store, TARGET, people.state, NOON)


def test_bad_and_corrected_ratings_are_separate_drift_features() -> None:
    sample = rating_sample([(True, True), (True, False), (False, False)])
    table = hit_table(rating_bets(sample), sample)
    assert (table == HIT).tolist() == [[True, True], [True, False], [False, False]]


def test_bound_of_each_rating_bet_is_the_upper_confidence_limit_of_the_reference_share() -> None:
    bets = rating_bets(rating_sample([(place < 6, place < 2) for place in range(100)]))
    assert [(bet.feature, bet.bound) for bet in bets] == [
        ("bad_ratings", upper_limit(6, 100, 2.0)),
        ("corrections", upper_limit(2, 100, 2.0)),
    ]


def test_bound_on_the_share_of_bad_ratings_is_1_if_all_reference_ratings_are_bad() -> None:
    assert rating_bets(rating_sample([(True, True)] * 100))[0].bound == pytest.approx(1)


def test_empty_rating_sample_has_categories_of_string_dtype() -> None:
    sample = rating_sample([])
    assert sample.size == 0
    assert all(values.dtype.kind == "U" for values in sample.categories.values())
    assert hit_table(rating_bets(rating_sample([(False, False)])), sample).shape == (0, 2)
