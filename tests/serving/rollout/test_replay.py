"""Rollouts where memory holds one engine: the candidate answers stored requests while no client sends any."""

import asyncio
import json
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine as Store

from serving.rollout.replay import find_replayable
from serving.rollout.shadow_pairs import ShadowPair, add_shadow_pair, read_shadow_pairs
from serving.rollout.split import Split
from svc.engine.state import EngineState
from svc.settings.rollout import RolloutSettings, UnitKind
from svc.store.requests import RequestOutcome, RequestRecord, add_requests
from svc.store.rollouts import RolloutOutcome, RolloutRecord, RolloutState
from tests.builders.actors import ANN
from tests.builders.rollouts import ALL, JSON, ONE, changes, ended, record, start
from tests.serving.control import Answer, Control, Make, ask, until
from tests.serving.versions import NAME, make_version, target

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
SLOW_S = 0.02
"""Time per token with which a test can act while a request is replayed."""


@pytest.fixture(autouse=True)
def _quick_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.rollout.analysis.units.WINDOW_S", 0.01)
    monkeypatch.setattr("serving.rollout.replay.QUIET_S", 0.05)
    monkeypatch.setattr("serving.rollout.replay._POLL_S", 0.01)


@pytest.fixture
def control(make: Make) -> Control:
    """A server whose machine has memory for one engine."""
    return on_small_machine(make())


def on_small_machine(control: Control) -> Control:
    control.park.room = "2 GB are missing"
    return control


def keep(control: Control, count: int = 30, number: int = 1, **fields: Any) -> None:
    """Store requests to a version with their prompts and answers."""
    served = target(number, control.format)
    rows = [
        RequestRecord(
            request_id=f"req-{at}",
            started_at=datetime.now(UTC) - timedelta(hours=1),
            model=NAME,
            version=served.version,
            format=served.format,
            route=CHAT,
            status=200,
            outcome=RequestOutcome.COMPLETE,
            seconds=0.1,
            finish_reason="length",
            tokens_in=2,
            tokens_out=4,
            prompt=json.dumps([{"role": "user", "content": f"question {at}"}]),
            answer="2.0 2.1 2.2 2.3 ",
            temperature=0.0,
            max_tokens=4,
        )._replace(**fields)
        for at in range(count)
    ]
    add_requests(control.store, rows)


def pairs(control: Control) -> list[ShadowPair]:
    return read_shadow_pairs(control.store, record(control).id)


def holds_candidate(control: Control) -> bool:
    return control.double.weights.endswith("/2/merged")


async def replayed(control: Control, count: int = 2) -> None:
    """Wait until some requests were replayed, and the candidate answers another one."""
    await until(lambda: len(pairs(control)) >= count and holds_candidate(control) and control.double.running)


async def test_good_candidate_is_promoted_after_a_replay_without_a_second_engine(control: Control) -> None:
    keep(control)
    async with control.run():
        start(control, 2)
        seen = await ended(control)
        await control.serves(target(2))
    assert (seen.outcome, seen.why) == (RolloutOutcome.PROMOTED, None), seen.steps
    assert len(control.park.engines) == 1
    assert [(pair.agrees, pair.candidate_failed, pair.production_tokens) for pair in pairs(control)] == [
        (True, False, 4)
    ] * ALL.shadow


async def test_rollout_steps_describe_the_replay_and_explain_why_there_is_no_canary(control: Control) -> None:
    keep(control)
    async with control.run():
        start(control, 2)
        seen = await ended(control)
    text = "\n".join(seen.steps)
    assert "only one engine, so tuned@2 (merged) answers 20 of 30 stored requests to tuned@1 (merged)" in text
    assert "an unknown time, because it was never loaded in place" in text
    assert "replay: comparing 20 stored answers of tuned@1 (merged) from the request log" in text
    assert "no canary: there is memory for only one engine; losses beyond the margins: excluded: none;" in text
    assert "(loads: 1); 0 stored requests could not be replayed unchanged" in text


async def test_all_stored_requests_are_replayed_when_fewer_than_configured_are_stored(control: Control) -> None:
    keep(control, 25)
    async with control.run():
        start(control, 2, ALL.model_copy(update={"shadow": 100}))
        assert (await ended(control)).outcome is RolloutOutcome.PROMOTED
    assert len(pairs(control)) == 25


async def test_candidate_that_returns_invalid_json_is_rolled_back_after_a_replay(control: Control) -> None:
    for number in (11, 12):
        make_version(control.registry, number, heldout=JSON)
    keep(control, 60, number=11, answer='{"team": "billing"}')

    async with control.run():
        await control.promote(11)
        start(control, 12, ALL.model_copy(update={"shadow": 60}))
        seen = await ended(control)
        await control.serves(target(11))
        assert control.double.weights.endswith("/11/merged")
    assert seen.outcome is RolloutOutcome.ROLLED_BACK
    assert seen.why is not None and "invalid JSON 100.0% instead of 0.0%" in seen.why


async def test_client_request_during_a_replay_is_answered_by_production(control: Control) -> None:
    keep(control)
    async with control.run(), control.client() as client:
        control.double.token_delay_s = SLOW_S
        start(control, 2)
        await replayed(control)
        served = control.names.served
        answer = await ask(client, stream=True)
        assert (answer.status, answer.version, answer.words, served) == (200, ONE, {"1"}, target(1))
        assert control.double.cancelled == 1
        assert (await ended(control)).outcome is RolloutOutcome.PROMOTED
    assert len({pair.replayed for pair in pairs(control)}) == len(pairs(control)) == ALL.shadow


async def test_client_request_during_a_replay_does_not_wait_for_a_long_replayed_request(control: Control) -> None:
    keep(control)
    async with control.run(), control.client() as client:
        start(control, 2)
        control.double.proceed.clear()
        await until(lambda: holds_candidate(control) and control.double.running)
        waiting = asyncio.create_task(ask(client, stream=True))
        await until(lambda: not holds_candidate(control) and control.double.running)
        control.double.proceed.set()
        assert (await waiting).version == ONE


@pytest.mark.parametrize("model", [NAME, ONE])
async def test_token_count_request_during_a_replay_is_answered_by_production(control: Control, model: str) -> None:
    keep(control)
    async with control.run(), control.client() as client:
        control.double.token_delay_s = SLOW_S
        start(control, 2)
        await replayed(control)
        answer = await client.post("/tokenize", json={"model": model, "prompt": "one two three"})
        assert (answer.status_code, answer.headers["x-model-version"]) == (200, ONE)
        assert (control.double.cancelled, holds_candidate(control)) == (1, False)


async def test_replay_waits_for_a_longer_pause_in_traffic_after_each_interruption(control: Control) -> None:
    keep(control)
    async with control.run(), control.client() as client:
        control.double.token_delay_s = SLOW_S
        start(control, 2)
        await replayed(control)
        await ask(client, stream=True)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await until(lambda: control.state is EngineState.SWAPPING)
        assert loop.time() - began >= 0.09
        changes(control, ALL).rollback(NAME, reason=None, actor=ANN)
        await ended(control)


async def test_rollback_during_a_replay_restores_production(control: Control) -> None:
    keep(control)
    async with control.run(), control.client() as client:
        control.double.token_delay_s = SLOW_S
        start(control, 2)
        await replayed(control)
        changes(control, ALL).rollback(NAME, reason="no", actor=ANN)
        assert (await ended(control)).outcome is RolloutOutcome.CANCELLED
        assert (control.state, control.double.weights.endswith("/1/merged")) == (EngineState.READY, True)
        assert (await ask(client, stream=True)).words == {"1"}
    assert len(control.park.engines) == 1


async def test_restoring_production_after_a_replay_does_not_start_a_held_out_evaluation(control: Control) -> None:
    keep(control)
    async with control.run():
        weights = control.pool.weights
        control.double.token_delay_s = SLOW_S
        start(control, 2)
        await replayed(control)
        changes(control, ALL).rollback(NAME, reason=None, actor=ANN)
        await ended(control)
        assert control.pool.weights == weights


async def test_replay_interrupted_by_a_server_restart_resumes_without_repeating_requests(
    control: Control,
) -> None:
    keep(control)
    control.park.prepare = lambda double: setattr(double, "token_delay_s", SLOW_S)
    async with control.run():
        start(control, 2)
        await replayed(control, 5)
    before = len(pairs(control))
    control.assemble()
    async with control.run():
        assert control.names.served == target(1)
        seen = await ended(control)
    assert 5 <= before < ALL.shadow
    assert seen.outcome is RolloutOutcome.PROMOTED, seen.steps
    assert len({pair.replayed for pair in pairs(control)}) == len(pairs(control)) == ALL.shadow


async def test_production_is_restored_in_the_engine_when_the_server_stops_during_a_replay(control: Control) -> None:
    keep(control)
    control.leaves = True
    async with control.run():
        control.double.token_delay_s = SLOW_S
        start(control, 2)
        await replayed(control)
    (left,) = control.park.left.values()
    assert (left.holds, control.double.weights.endswith("/1/merged")) == (str(target(1)), True)
    control.leaves = False
    control.assemble()
    async with control.run():
        assert control.double is left.double
        assert (await ended(control)).outcome is RolloutOutcome.PROMOTED


async def test_engine_is_stopped_if_the_production_version_is_not_restored_in_time_at_server_shutdown(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.rollout.replay._STOP_TIMEOUT_S", 0.05)
    keep(control)
    control.leaves = True
    async with control.run():
        control.double.token_delay_s = SLOW_S
        start(control, 2)
        await replayed(control)
        control.double.reload_delay_s = 60
    assert (control.park.left, control.park.alive) == ({}, 0)


async def test_engine_with_a_candidate_loaded_is_not_adopted_after_the_server_is_killed(control: Control) -> None:
    keep(control)
    async with control.run():
        control.double.token_delay_s = SLOW_S
        start(control, 2)
        await replayed(control)
        assert control.park.engines[0].holds is None
        changes(control, ALL).rollback(NAME, reason=None, actor=ANN)
        await ended(control)


async def test_engine_is_replaced_when_production_cannot_be_restored_after_a_replay(control: Control) -> None:
    keep(control)
    async with control.run(), control.client() as client:
        control.double.loadable = lambda folder: not folder.endswith("/1/merged")
        start(control, 2)
        seen = await ended(control)
        await control.serves(target(1))
        assert (await ask(client, stream=True)).words == {"1"}
    assert seen.outcome is RolloutOutcome.FAILED
    assert seen.why is not None and "could not reload tuned@1 (merged)" in seen.why
    assert len(control.park.engines) == 2


async def test_rollout_fails_when_a_client_request_interrupts_the_replay_but_production_cannot_be_reloaded(
    control: Control,
) -> None:
    keep(control)
    async with control.run(), control.client() as client:
        control.double.token_delay_s = SLOW_S
        control.double.loadable = lambda folder: not folder.endswith("/1/merged")
        start(control, 2)
        await replayed(control)
        assert (await ask(client, stream=True)).words == {"1"}
        seen = await ended(control)
    assert (seen.outcome, len(control.park.engines)) == (RolloutOutcome.FAILED, 2)


async def test_rollout_fails_when_the_candidate_does_not_pass_verification(control: Control) -> None:
    make_version(control.registry, 4, probes_of="/elsewhere")
    keep(control)
    async with control.run(), control.client() as client:
        start(control, 4)
        seen = await ended(control)
        assert (await ask(client, stream=True)).words == {"1"}
    assert seen.outcome is RolloutOutcome.FAILED
    assert seen.why is not None and "not the version's weights" in seen.why
    assert len(control.park.engines) == 1


async def test_rollout_fails_when_the_engine_dies_with_the_candidate_loaded(control: Control) -> None:
    keep(control)
    async with control.run(), control.client() as client:
        control.double.token_delay_s = SLOW_S
        start(control, 2)
        await replayed(control)
        control.park.engines[0].kill()
        seen = await ended(control)
        await control.serves(target(1))
        assert (await ask(client, stream=True)).words == {"1"}
    assert seen.outcome is RolloutOutcome.FAILED
    assert seen.why is not None and "the engine died while tuned@2 (merged) was answering a stored request" in seen.why


async def test_requests_with_incompletely_stored_prompts_are_not_replayed(control: Control) -> None:
    keep(control, 25)
    keep(control, 5, tokens_in=200)
    async with control.run():
        start(control, 2, ALL.model_copy(update={"shadow": 30}))
        seen = await ended(control)
    assert seen.outcome is RolloutOutcome.PROMOTED, seen.steps
    assert len(pairs(control)) == 25
    assert any("5 stored requests could not be replayed unchanged" in step for step in seen.steps)


async def test_slow_candidate_does_not_fail_while_it_keeps_sending_tokens(make: Make) -> None:
    control = on_small_machine(make(request_timeout_s=0.3))
    keep(control)
    async with control.run():
        control.double.on_call = lambda path: setattr(control.double, "token_delay_s", 0.1 * (path == CHAT))
        start(control, 2)
        await replayed(control, 1)
        assert not any(pair.candidate_failed for pair in pairs(control))
        changes(control, ALL).rollback(NAME, reason=None, actor=ANN)
        await ended(control)


async def test_stored_request_is_skipped_when_the_answer_is_too_large(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.rollout.shadow.MAX_ANSWER_BYTES", 100)
    keep(control)
    async with control.run():
        start(control, 2)
        seen = await ended(control)
    assert (seen.outcome, pairs(control)) == (RolloutOutcome.UNDECIDED, [])


async def test_engine_keeps_running_when_an_unexpected_error_ends_the_replay(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **fields: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("serving.rollout.replay.compared", fail)
    keep(control)
    async with control.run():
        start(control, 2)
        seen = await ended(control)
        assert (control.state, control.double.weights.endswith("/1/merged")) == (EngineState.READY, True)
    assert (seen.outcome, len(control.park.engines)) == (RolloutOutcome.FAILED, 1)


async def test_engine_reports_no_version_while_production_is_being_restored(control: Control) -> None:
    keep(control)
    named, waiting = list[str | None](), list[asyncio.Task[Answer]]()
    async with control.run(), control.client() as client:

        def on_call(path: str) -> None:
            if path == "/collective_rpc":
                named.append(control.park.engines[0].holds)
            elif path == "/v1/completions" and holds_candidate(control) and not waiting:  # a probe
                waiting.append(asyncio.create_task(ask(client, stream=True)))

        control.double.token_delay_s = 0.1
        control.double.on_call = on_call
        start(control, 2)
        await until(lambda: waiting)
        assert (await waiting[0]).version == ONE
        assert named == [None, None]
        changes(control, ALL).rollback(NAME, reason=None, actor=ANN)
        await ended(control)


async def test_rollout_is_undecided_when_too_few_requests_can_be_replayed(control: Control) -> None:
    keep(control, 30, tokens_in=200)
    async with control.run():
        start(control, 2)
        seen = await ended(control)
    assert seen.outcome is RolloutOutcome.UNDECIDED
    assert seen.why is not None and seen.why.startswith("only 0 users or conversations were compared")


async def test_requests_rejected_by_the_candidate_do_not_count_against_it(control: Control) -> None:
    keep(control, 25)

    def reject_first(path: str) -> None:
        rejects = path == CHAT and control.double.calls.count(path) <= 5
        control.double.refuse_with = (400, {"message": "no such field", "code": 400}) if rejects else None

    async with control.run():
        control.double.on_call = reject_first
        start(control, 2, ALL.model_copy(update={"shadow": 25}))
        seen = await ended(control)
    assert seen.outcome is RolloutOutcome.PROMOTED, seen.steps
    assert [pair.candidate_failed for pair in pairs(control)] == [False] * 20


async def test_rollout_is_undecided_when_half_of_the_requests_fail_but_no_loss_is_proven(control: Control) -> None:
    keep(control)

    def fail_each_second(path: str) -> None:
        fails = path == CHAT and control.double.calls.count(path) % 2
        control.double.refuse_with = (500, {"message": "CUDA error", "code": 500}) if fails else None

    async with control.run():
        control.double.on_call = fail_each_second
        start(control, 2)
        seen = await ended(control)
    assert seen.outcome is RolloutOutcome.UNDECIDED
    assert seen.why is not None and "measured, but not proven: failed requests" in seen.why
    assert control.names.served == target(1)


async def test_rollout_fails_before_loading_the_candidate_when_stored_requests_are_from_few_users(
    control: Control,
) -> None:
    keep(control, 30, user_hash="one user")
    async with control.run():
        start(control, 2)
        seen = await ended(control)
        assert "/collective_rpc" not in control.double.calls
    assert seen.outcome is RolloutOutcome.FAILED
    assert seen.why is not None and "come from only 1 users or conversations" in seen.why


async def test_rollout_fails_before_loading_the_candidate_if_two_model_loads_would_exceed_the_queue_timeout(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.rollout.replay.last_queued_s", lambda store, target: 1.25)
    control = on_small_machine(make(queue_timeout_s=2))
    keep(control)
    async with control.run():
        start(control, 2)
        seen = await ended(control)
        assert "/collective_rpc" not in control.double.calls
    assert seen.outcome is RolloutOutcome.FAILED
    assert seen.why is not None and "two loads of 1.2 s each, but would be rejected after 2 s" in seen.why


async def test_client_does_not_wait_for_a_slow_store(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, proceed = threading.Event(), threading.Event()

    def add_slowly(store: Store, rollout: int, pair: ShadowPair) -> None:
        writing.set()
        proceed.wait(10)
        add_shadow_pair(store, rollout, pair)

    monkeypatch.setattr("serving.rollout.replay.add_shadow_pair", add_slowly)
    keep(control)
    async with control.run(), control.client() as client:
        start(control, 2)
        await until(writing.is_set)
        assert (await ask(client, stream=True)).version == ONE
        assert pairs(control) == []
        proceed.set()
        assert (await ended(control)).outcome is RolloutOutcome.PROMOTED
    assert len({pair.replayed for pair in pairs(control)}) == len(pairs(control)) == ALL.shadow


async def test_requests_of_one_user_are_separate_observations_when_the_rollout_counts_requests_instead_of_users(
    control: Control,
) -> None:
    keep(control, 30, user_hash="one user")
    async with control.run():
        start(control, 2, ALL.model_copy(update={"unit": UnitKind.REQUEST}))
        assert (await ended(control)).outcome is RolloutOutcome.PROMOTED


@pytest.mark.parametrize(
    ("plan", "kept", "why"),
    [
        (ALL, 0, "only 0 stored requests to tuned@1 (merged) can be replayed"),
        (ALL, 19, "set `request_log.content_share`"),
        (ALL.model_copy(update={"shadow": 19}), 30, "replay at least 20 stored requests (--shadow 20)"),
        (ALL.model_copy(update={"shadow": 0}), 30, "a shadow step of 0 requests is too short"),
    ],
)
async def test_rollout_fails_before_loading_the_candidate_when_no_request_can_be_replayed(
    control: Control, plan: RolloutSettings, kept: int, why: str
) -> None:
    keep(control, kept)
    async with control.run():
        start(control, 2, plan)
        seen = await ended(control)
        assert "/collective_rpc" not in control.double.calls
    assert seen.outcome is RolloutOutcome.FAILED
    assert seen.why is not None and why in seen.why


async def test_rollout_fails_if_the_candidate_needs_a_second_engine_and_memory_is_insufficient(
    control: Control,
) -> None:
    make_version(control.registry, 4, width=8)
    keep(control)
    async with control.run():
        start(control, 4)
        seen = await ended(control)
    assert seen.outcome is RolloutOutcome.FAILED
    assert seen.why is not None and "cannot be loaded in place of the production version: architecture" in seen.why


async def test_after_a_restart_the_canary_fails_if_the_memory_cannot_hold_a_second_engine(make: Make) -> None:
    control = make()
    keep(control)
    async with control.run():
        start(control, 2, ALL.model_copy(update={"shadow": 0, "max_errors": 0.001}))
        await until(lambda: record(control).state is RolloutState.CANARY)
    on_small_machine(control).assemble()
    async with control.run():
        seen = await ended(control)
    assert seen.outcome is RolloutOutcome.FAILED
    assert seen.why is not None and seen.why.startswith("not enough memory to run tuned@2")


async def test_only_requests_from_the_week_before_the_rollout_are_replayed(control: Control) -> None:
    async with control.run():
        start(control, 2, ALL.model_copy(update={"shadow": 5}))
        seen: RolloutRecord = await ended(control)
    keep(control, 3)
    keep(control, 4, started_at=seen.requested_at + timedelta(seconds=1))
    keep(control, 4, started_at=seen.requested_at - timedelta(days=8))
    assert find_replayable(control.store, seen, Split(seen.id, 0.0)).total == 3
