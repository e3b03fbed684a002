"""What stored requests say about the two versions of a rollout."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import update

from serving.rollout.assigned_requests import unit_text
from serving.rollout.evidence import CanaryEvidence, ShadowEvidence, exclusions, expectations, open_questions
from serving.rollout.shadow_pairs import ShadowPair, add_shadow_pair
from svc.settings.rollout import RolloutSettings
from svc.store.audit import Action, AuditEntry
from svc.store.desired import Desired, change_desired
from svc.store.feedback import Feedback, Rating, keep_feedback
from svc.store.requests import RequestOutcome, RequestRecord, add_requests
from svc.store.rollouts import RolloutRecord, begin_rollout
from svc.store.swaps import SwapKind, SwapOutcome, SwapResult, begin_swap, end_swap
from svc.store.tables import FeedbackRow
from tests.builders.actors import ANN
from tests.serving.versions import NAME, target

PLAN = RolloutSettings(shadow=50, canary=(50, 100), max_errors=0.05, max_invalid=0.05)


@pytest.fixture
def record(store: Store) -> RolloutRecord:
    """A rollout of version 2."""
    desired = change_desired(store, None, target(1), None)
    return begin_rollout(store, desired, target(2), PLAN, AuditEntry(Action.ROLLOUT, NAME, ANN))


def answered(
    record: RolloutRecord,
    number: int,
    *,
    candidate: bool,
    outcome: RequestOutcome = RequestOutcome.COMPLETE,
    served: bool = True,
    valid: bool | None = None,
    seconds: float | None = None,
    unit: str = "",
) -> RequestRecord:
    version = target(2 if candidate else 1)
    return RequestRecord(
        request_id=f"{candidate}{number}",
        started_at=record.requested_at + timedelta(seconds=1 + number / 100),
        model=NAME,
        version=version.version if served else None,
        format=version.format if served else None,
        route="/v1/chat/completions",
        status=200,
        outcome=outcome,
        seconds=0.1 + number * 37 % 100 / 1000 if seconds is None else seconds,
        unit=unit_text(record.id, unit, candidate=candidate),
        valid=valid,
    )


def add(store: Store, record: RolloutRecord, count: int, **of_candidate: object) -> None:
    for number in range(count):
        candidate = answered(record, number, candidate=True, **of_candidate)  # type: ignore[arg-type]
        add_requests(store, [answered(record, number, candidate=False, valid=True), candidate])


def test_canary_proves_that_a_candidate_is_worse_if_it_answers_with_invalid_json(
    store: Store, record: RolloutRecord
) -> None:
    add(store, record, 30, valid=False)
    result = CanaryEvidence(store, record).assess()
    assert result.losses.startswith("invalid JSON 100.0% instead of 0.0%, allowed increase 5 percentage points: failed")


@pytest.mark.slow
def test_canary_of_an_equally_good_candidate_passes_after_enough_requests(store: Store, record: RolloutRecord) -> None:
    evidence = CanaryEvidence(store, record)
    add(store, record, 20, valid=True)
    assert (evidence.assess().is_passed, evidence.assess().units) == (False, 20)
    add(store, record, 300, valid=True)
    assert (evidence.assess().is_passed, evidence.assess().losses) == (True, "")


@pytest.mark.parametrize("outcome", [RequestOutcome.ENGINE_ERROR, RequestOutcome.SERVER_ERROR, RequestOutcome.REFUSED])
def test_canary_proves_that_a_candidate_is_worse_if_its_engine_fails_requests(
    store: Store, record: RolloutRecord, outcome: RequestOutcome
) -> None:
    add(store, record, 30, outcome=outcome)
    assert "failed requests 100.0%" in CanaryEvidence(store, record).assess().losses


def test_requests_rejected_by_the_gateway_do_not_count_against_a_version(store: Store, record: RolloutRecord) -> None:
    add(store, record, 30, outcome=RequestOutcome.REFUSED, served=False)
    assert CanaryEvidence(store, record).assess().units == 0


def test_time_to_first_token_includes_requests_that_the_client_abandons_before_the_first_token(
    store: Store, record: RolloutRecord
) -> None:
    add(store, record, 200, outcome=RequestOutcome.CLIENT_GONE, seconds=10.0)
    losses = CanaryEvidence(store, record).assess().losses
    assert "time to first token" in losses and "failed requests" not in losses


@pytest.mark.parametrize("outcome", [RequestOutcome.ENGINE_ERROR, RequestOutcome.REFUSED])
def test_time_to_first_token_excludes_requests_that_the_engine_fails_or_refuses(
    store: Store, record: RolloutRecord, outcome: RequestOutcome
) -> None:
    for number in range(40):
        of_candidate = outcome if number % 2 else RequestOutcome.COMPLETE
        candidate = answered(record, number, candidate=True, outcome=of_candidate)
        add_requests(store, [answered(record, number, candidate=False), candidate])
    rows = {row.signal: row for row in CanaryEvidence(store, record).assess().signals}
    assert (rows["errors"].units, rows["first_token"].units) == (40, 20)


@pytest.mark.slow
def test_bad_ratings_can_fail_a_rollout_but_missing_ratings_do_not_block_it(
    store: Store, record: RolloutRecord
) -> None:
    add(store, record, 300, valid=True)
    for number in range(300):
        for candidate in (False, True):
            rating = Rating.BAD if candidate else Rating.GOOD
            keep_feedback(store, f"{candidate}{number}", Feedback(rating))
            if (number, candidate) == (2, True):
                assert CanaryEvidence(store, record).assess().is_passed
    assert "bad ratings 100.0%" in CanaryEvidence(store, record).assess().losses


@pytest.mark.slow
def test_ratings_are_counted_even_if_stored_by_a_server_whose_clock_is_behind(
    store: Store, record: RolloutRecord
) -> None:
    evidence = CanaryEvidence(store, record)
    add(store, record, 201, valid=True)
    keep_feedback(store, "False200", Feedback(Rating.GOOD))
    evidence.assess()
    for number in range(200):
        for candidate in (False, True):
            keep_feedback(store, f"{candidate}{number}", Feedback(Rating.BAD if candidate else Rating.GOOD))
    with store.begin() as connection:
        connection.execute(update(FeedbackRow).values(given_at=record.requested_at - timedelta(seconds=30)))
    assert "bad ratings 100.0%" in evidence.assess().losses


def test_rollout_step_counts_only_observations_made_since_it_started(store: Store, record: RolloutRecord) -> None:
    add(store, record, 60)
    evidence = CanaryEvidence(store, record)
    evidence.start_step(record.requested_at + timedelta(seconds=1.4))
    assert evidence.assess().units == 20


def add_of_units(store: Store, record: RolloutRecord, units: list[str], start: int = 0) -> None:
    """Add one request of production for each unit; an empty text is a unit by itself."""
    requests = enumerate(units, start=start)
    add_requests(store, [answered(record, number, candidate=False, unit=unit) for number, unit in requests])


@pytest.mark.parametrize(
    ("units", "warns"),
    [
        (["ann"] * 51 + [""] * 49, True),
        (["ann"] * 50 + [""] * 50, False),
        (["ann"] * 50 + ["ben"] * 50, False),
        (["ann"] * 99, False),
        ([""] * 200, False),
    ],
)
def test_warning_about_a_dominant_user_requires_100_requests_with_more_than_half_from_that_user(
    store: Store, record: RolloutRecord, units: list[str], warns: bool
) -> None:
    add_of_units(store, record, units)
    assert bool(CanaryEvidence(store, record).assess().warning) is warns


def test_share_of_requests_from_one_user_is_computed_over_both_versions(store: Store, record: RolloutRecord) -> None:
    add_of_units(store, record, ["ann"] * 100)
    add_requests(store, [answered(record, number, candidate=True) for number in range(100)])
    assert CanaryEvidence(store, record).assess().warning == ""


def test_warning_about_a_dominant_user_suggests_a_fix(store: Store, record: RolloutRecord) -> None:
    add_of_units(store, record, ["ann"] * 100)
    warning = CanaryEvidence(store, record).assess().warning
    assert "counts as one observation" in warning
    assert "send `user`" in warning and f"models.{NAME}.rollout.unit: request" in warning


def test_share_of_requests_from_one_user_is_computed_separately_for_each_rollout_step(
    store: Store, record: RolloutRecord
) -> None:
    evidence = CanaryEvidence(store, record)
    add_of_units(store, record, ["ann"] * 100)
    assert evidence.assess().warning
    evidence.start_step(record.requested_at + timedelta(seconds=2))
    add_of_units(store, record, ["ann"] * 40, start=100)
    assert evidence.assess().warning == ""


@pytest.mark.slow
def test_shadow_pairs_of_one_user_count_as_one_observation(store: Store, record: RolloutRecord) -> None:
    bad = ShadowPair("ann", False, True, None, None, None, "stop", None, 3, None, 0.1, 0.1)
    good = ShadowPair("", False, False, True, True, True, "stop", "stop", 3, 3, 0.1, 0.2)
    for pair in [bad] * 30 + [good] * 30:
        add_shadow_pair(store, record.id, pair)
    result = ShadowEvidence(store, record, lambda: 50).assess()
    assert (result.units, result.losses) == (60, "")
    for _ in range(30):
        add_shadow_pair(
            store, record.id, ShadowPair("", False, True, None, None, None, "stop", None, 3, None, 0.1, 0.1)
        )
    assert "failed requests" in ShadowEvidence(store, record, lambda: 50).assess().losses


def test_shadow_report_compares_logprobs_of_requests_answered_by_both_versions(
    store: Store, record: RolloutRecord
) -> None:
    pair = ShadowPair("", False, False, None, None, True, "stop", "stop", 3, 3, 0.1, 0.2)
    known = replace(pair, candidate_logprob=-0.5, production_logprob=-0.25)
    alone = replace(pair, candidate_logprob=-9.0)
    for each in (known, replace(known, candidate_logprob=-0.25), alone):
        add_shadow_pair(store, record.id, each)
    text = ShadowEvidence(store, record, lambda: 50).assess().text
    assert "mean log-probability -0.38 instead of -0.25 nats per token (2 requests)" in text


def test_shadow_report_omits_logprobs_when_production_has_none(store: Store, record: RolloutRecord) -> None:
    pair = ShadowPair("", False, False, None, None, True, "stop", "stop", 3, 3, 0.1, 0.2, candidate_logprob=-0.5)
    add_shadow_pair(store, record.id, pair)
    assert "log-probability" not in ShadowEvidence(store, record, lambda: 50).assess().text


def test_logprobs_do_not_affect_the_rollout_decision(store: Store, record: RolloutRecord) -> None:
    pair = ShadowPair("", False, False, None, None, True, "stop", "stop", 3, 3, 0.1, 0.2, -0.1, -9.0)
    for _ in range(60):
        add_shadow_pair(store, record.id, pair)
    result = ShadowEvidence(store, record, lambda: 50).assess()
    assert (result.losses, {signal.signal for signal in result.signals}) == ("", {"errors"})


def test_rollout_preview_warns_when_traffic_is_too_low_for_the_deadline(store: Store, record: RolloutRecord) -> None:
    add_requests(store, [answered(record, 0, candidate=False)._replace(started_at=datetime.now(UTC))])
    assert any("longer than its deadline" in text for text in expectations(store, record))


def test_replay_preview_says_how_long_client_requests_may_wait(store: Store, record: RolloutRecord) -> None:
    swap = begin_swap(store, Desired(record.previous, None, 1))
    end_swap(store, swap, SwapResult(SwapOutcome.SUCCEEDED, None, 1.25, kind=SwapKind.INPLACE))
    texts = expectations(store, record, kept=33)
    assert (
        "tuned@2 (merged) answers 33 of 33 stored requests to tuned@1 (merged) while no client sends requests"
        in texts[1]
    )
    assert texts[2].endswith(
        "waits until tuned@1 (merged) is loaded again: about 1.2 s, or twice that if the candidate is being loaded"
    )


GOOD = ShadowPair("", False, False, True, True, True, "stop", "stop", 3, 3, 0.1, 0.2)
FAILED = replace(GOOD, candidate_failed=True, candidate_valid=None, agrees=None)


def test_shadow_result_stays_incomplete_if_the_required_number_of_requests_drops_during_the_check(
    store: Store, record: RolloutRecord
) -> None:
    wanted = iter((31, 30))
    evidence = ShadowEvidence(store, record, lambda: next(wanted))
    for number in range(30):
        add_shadow_pair(store, record.id, replace(FAILED, unit=f"user {number}"))
    early, late = evidence.assess(), evidence.assess()
    assert (early.is_complete, early.losses, late.is_complete) == (False, "", True)
    assert "failed requests" in late.losses


def doubts_about(store: Store, record: RolloutRecord, pairs: list[ShadowPair]) -> str:
    for pair in pairs:
        add_shadow_pair(store, record.id, pair)
    result = ShadowEvidence(store, record, lambda: len(pairs)).assess()
    assert result.losses == ""
    return open_questions(result, 20)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [GOOD, FAILED])
def test_replay_of_requests_from_too_few_users_is_never_conclusive(
    store: Store, record: RolloutRecord, pair: ShadowPair
) -> None:
    pairs = [replace(pair, unit=f"user {number % 15}") for number in range(200)]
    assert doubts_about(store, record, pairs).startswith("only 15 users or conversations were compared; at least 20")


def test_replay_is_inconclusive_when_a_measured_loss_is_neither_proven_nor_excluded(
    store: Store, record: RolloutRecord
) -> None:
    text = doubts_about(store, record, [FAILED, *[GOOD] * 4] * 4)
    assert text.startswith("losses beyond the margins were measured, but not proven: failed requests: 20 requests")


def test_replay_is_conclusive_when_the_candidate_is_as_good_as_production(store: Store, record: RolloutRecord) -> None:
    assert doubts_about(store, record, [GOOD] * 20) == ""


@pytest.mark.slow
def test_replay_report_lists_the_metrics_whose_loss_provably_stays_within_the_margin(
    store: Store, record: RolloutRecord
) -> None:
    good = ShadowPair("", False, False, True, True, True, "stop", "stop", 3, 3, 0.1, 0.2)
    evidence = ShadowEvidence(store, record, lambda: 50)
    for _ in range(300):
        add_shadow_pair(store, record.id, good)
    assert exclusions(evidence.assess()) == (
        "losses beyond the margins: excluded: failed requests, invalid JSON; not excluded: none; "
        "not compared: time to first token (p95), bad ratings"
    )
