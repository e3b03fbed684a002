"""Rollouts: a candidate is tried on copies and on a share of clients, and promoted or rolled back by its evidence."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import update
from sqlalchemy.exc import OperationalError

from serving.rollout.evidence import Assessment, CanaryEvidence
from serving.rollout.promotion import RolloutOptions
from serving.rollout.shadow_pairs import read_shadow_pairs
from svc.errors import BusyError, SettingsError
from svc.settings.rollout import AtDeadline, RolloutSettings
from svc.store.audit import Action, AuditEntry, read_events
from svc.store.desired import Desired, change_desired, read_desired
from svc.store.gate_rows import GATE_ROWS
from svc.store.leases import Lease
from svc.store.rollouts import (
    RolloutOutcome,
    RolloutRecord,
    RolloutState,
    RolloutView,
    begin_rollout,
    enter_state,
    switch_rollout,
)
from svc.store.swaps import SwapOutcome, SwapResult, begin_swap, end_swap
from svc.store.tables import RolloutRow
from svc.store.webhooks import due_deliveries
from svc.version import Format
from tests.builders.actors import ANN
from tests.builders.rollouts import ALL, JSON, ONE, Users, changes, ended, record, start
from tests.serving.control import BODY, Control, Make, until
from tests.serving.engine_double import EngineDouble
from tests.serving.versions import NAME, make_version, target

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _close_units_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.rollout.analysis.units.WINDOW_S", 0.01)


@pytest.fixture
def control(make: Make) -> Control:
    """A server of versions 1 to 3, and of 11 and 12, whose held-out answers are JSON."""
    control = make()
    for number in (11, 12):
        make_version(control.registry, number, heldout=JSON)
    return control


async def test_good_candidate_passes_shadow_and_canary_and_becomes_production(control: Control) -> None:
    async with control.run(), control.client() as client, Users(client).asking() as users:
        start(control, 2)
        seen = await ended(control)
        assert (seen.outcome, seen.why) == (RolloutOutcome.PROMOTED, None), seen.steps
        await control.serves(target(2))
        await until(lambda: control.park.alive == 1)
        before = len(users.statuses)
        await until(lambda: len(users.statuses) > before + 8)
        assert control.router.find(NAME, "anyone").assignment is None
    assert set(users.statuses) == {200}
    assert {signal.signal for signal in seen.signals} == {"errors", "first_token"}
    assert len(read_shadow_pairs(control.store, seen.id)) >= 20
    assert control.desired().previous == target(1)
    assert {gate.gate for gate in seen.gates} > {"checks", "files", "quality"}
    assert [event.details["gates"] for event in read_events(control.store, newest=2)] == [
        GATE_ROWS.dump_python(seen.gates, mode="json")
    ] * 2
    assert control.sample("svc_rollouts_total", model=NAME, outcome="promoted") == 1


async def test_webhooks_are_notified_of_each_rollout_transition(control: Control) -> None:
    control.deployment.rollouts.webhooks = ("https://hooks.example/",)
    async with control.run(), control.client() as client, Users(client).asking():
        start(control, 2)
        assert (await ended(control)).outcome is RolloutOutcome.PROMOTED
    messages = [json.loads(each.body) for each in due_deliveries(control.store, "https://hooks.example/", 99)]
    kinds = [message["type"].removeprefix("rollout.") for message in messages]
    assert kinds == ["requested", "shadow", "canary", "canary", "promoted"]
    assert [message["data"]["canary"] for message in messages] == [None, None, 25, 50, None]


async def test_user_is_never_moved_back_to_production_during_the_canary(control: Control) -> None:
    async with control.run(), control.client() as client, Users(client).asking() as users:
        start(control, 2, ALL.model_copy(update={"shadow": 0}))
        assert (await ended(control)).outcome is RolloutOutcome.PROMOTED
    both = [versions for versions in users.versions.values() if len(versions) > 1]
    assert len(both) < 12  # only users whose two requests were sent around the start of a step


async def test_clients_never_see_the_candidate_during_the_shadow_step(control: Control) -> None:
    plan = ALL.model_copy(update={"shadow": 30, "canary": (), "max_errors": 0.5})
    async with control.run(), control.client() as client, Users(client).asking() as users:
        start(control, 2, plan)
        await until(lambda: len(read_shadow_pairs(control.store, record(control).id)) >= 10)
        seen_in_shadow = set().union(*users.versions.values())
        assert (await ended(control)).outcome is RolloutOutcome.PROMOTED
    assert seen_in_shadow == {ONE}
    assert control.sample("svc_shadow_requests_total", model=NAME, outcome="compared") >= 30


async def test_candidate_that_returns_invalid_json_is_rolled_back(control: Control) -> None:
    def prepare(double: EngineDouble) -> None:
        double.message = {"content": '{"team": "billing"}'}

    control.park.prepare = prepare
    async with control.run():
        await control.promote(11)
        control.park.prepare = lambda double: setattr(double, "message", {"content": '{"team": "bil'})
        async with control.client() as client, Users(client).asking() as users:
            start(control, 12, ALL.model_copy(update={"shadow": 0}))
            seen = await ended(control)
            await until(lambda: control.park.alive == 1)
    assert seen.outcome is RolloutOutcome.ROLLED_BACK
    assert seen.why is not None and "invalid JSON 100.0% instead of 0.0%" in seen.why
    assert control.reconciler.actual.target == target(11)
    assert set(users.statuses) == {200}


async def test_candidate_that_fails_shadow_requests_is_rolled_back_before_serving_any_client(control: Control) -> None:
    async with control.run(), control.client() as client, Users(client).asking() as users:
        start(control, 2, ALL.model_copy(update={"shadow": 1000}))
        await until(lambda: record(control).state is RolloutState.SHADOW)
        control.double.refuse_with = (500, {"message": "CUDA error"})
        seen = await ended(control)
    assert seen.outcome is RolloutOutcome.ROLLED_BACK, seen
    assert set().union(*users.versions.values()) == {ONE}
    assert set(users.statuses) == {200}


async def test_rollback_during_the_canary_sends_all_clients_to_production_within_two_seconds(control: Control) -> None:
    endless = ALL.model_copy(update={"shadow": 0, "max_errors": 0.001})
    async with control.run(), control.client() as client, Users(client).asking() as users:
        start(control, 2, endless)
        await until(lambda: f"{NAME}@2" in set().union(*users.versions.values(), set()))
        async with asyncio.timeout(2):
            changes(control, endless).rollback(NAME, reason="a bad feeling", actor=ANN)
            await until(lambda: record(control).outcome is not None)
        assert control.router.find(NAME, "anyone").assignment is None
        await until(lambda: control.park.alive == 1)
    assert (record(control).outcome, record(control).why) == (
        RolloutOutcome.CANCELLED,
        "rolled back by user:ann: a bad feeling",
    )
    assert set(users.statuses) == {200}
    assert control.desired().target == target(1)


async def test_production_keeps_answering_and_the_rollout_fails_when_the_candidate_engine_dies(
    control: Control,
) -> None:
    async with control.run(), control.client() as client, Users(client).asking() as users:
        start(control, 2, ALL.model_copy(update={"shadow": 0, "max_errors": 0.001}))
        await until(lambda: f"{NAME}@2" in set().union(*users.versions.values(), set()))
        control.park.engines[-1].kill()
        seen = await ended(control)
        answered = len(users.statuses)
        await until(lambda: len(users.statuses) > answered + 12)
    assert seen.outcome is RolloutOutcome.FAILED
    assert seen.why is not None and seen.why.startswith("the candidate's engine died")
    assert set(users.statuses[answered:]) == {200}


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(RolloutState.LOADING, marks=pytest.mark.matrix),
        pytest.param(RolloutState.SHADOW, marks=pytest.mark.matrix),
        RolloutState.CANARY,
    ],
)
async def test_rollout_continues_in_the_same_state_after_the_server_is_killed(
    control: Control, state: RolloutState
) -> None:
    slow = ALL.model_copy(update={"shadow": 60})
    control.park.start_delay_s = 0.2
    async with control.run(), control.client() as client, Users(client).asking():
        start(control, 2, slow)
        await until(lambda: record(control).state is state, 20)
    control.assemble()
    async with control.run(), control.client() as client, Users(client).asking() as users:
        seen = await ended(control)
    assert seen.outcome is RolloutOutcome.PROMOTED, seen.steps
    assert any(step.startswith(f"the server started again; the rollout continues at {state}") for step in seen.steps)
    assert set(users.statuses) == {200}


def switched(control: Control) -> RolloutRecord:
    """Request a rollout of version 2, and make its candidate the desired version, as before the final swap."""
    desired = read_desired(control.store, NAME)
    assert desired is not None
    begun = begin_rollout(control.store, desired, target(2), ALL, AuditEntry(Action.ROLLOUT, f"{NAME}@2", ANN, None))
    found = switch_rollout(control.store, begun)
    assert found is not None
    return found


async def test_promotion_of_the_candidate_is_completed_if_the_server_was_killed_before_the_swap(
    control: Control,
) -> None:
    control.leaves = True  # a killed server leaves its engine running
    async with control.run():
        pass
    switched(control)
    control.leaves = False
    control.assemble()
    async with control.run(), control.client() as client, Users(client).asking() as users:
        assert control.reconciler.actual.target == target(1)
        assert (await ended(control)).outcome is RolloutOutcome.PROMOTED
        await control.serves(target(2))
    assert set(users.statuses) == {200}


async def test_rollout_ends_as_promoted_when_the_restarted_server_serves_the_candidate(control: Control) -> None:
    switched(control)
    control.assemble()
    async with control.run():
        assert (await ended(control)).outcome is RolloutOutcome.PROMOTED
        await control.serves(target(2))


async def test_rollout_fails_when_the_restarted_server_cannot_start_the_candidate(control: Control) -> None:
    begun = switched(control)
    swap = begin_swap(control.store, Desired(target(2), target(1), begun.generation + 1))
    end_swap(control.store, swap, SwapResult(SwapOutcome.FAILED, "the server stopped during the swap"))
    desired = read_desired(control.store, NAME)
    assert desired is not None
    change_desired(control.store, desired, target(1), None)
    async with control.run():
        seen = await ended(control)
    assert (seen.outcome, seen.why) == (RolloutOutcome.FAILED, "the server stopped during the swap")


async def test_rollout_counts_as_promoted_even_if_another_promotion_follows_its_successful_swap(
    control: Control,
) -> None:
    begun = switched(control)
    swap = begin_swap(control.store, Desired(target(2), target(1), begun.generation + 1))
    end_swap(control.store, swap, SwapResult(SwapOutcome.SUCCEEDED))
    desired = read_desired(control.store, NAME)
    assert desired is not None
    change_desired(control.store, desired, target(1), target(2))
    async with control.run():
        assert (await ended(control)).outcome is RolloutOutcome.PROMOTED
        await control.serves(target(1))


async def test_candidate_is_promoted_if_the_database_connection_closes_after_the_switch_is_committed(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[bool] = []

    def switch(store: Store, record: RolloutRecord, *, lease: Lease | None) -> RolloutRecord | None:
        done = switch_rollout(store, record, lease=lease)
        if not lost:
            lost.append(True)
            raise OperationalError("COMMIT", {}, Exception("the connection was closed"))
        return done

    monkeypatch.setattr("serving.rollout.stored_rollout.switch_rollout", switch)
    monkeypatch.setattr("serving.rollout.store_retry.STORE_PAUSE_S", 0.01)
    async with control.run(), control.client() as client, Users(client).asking():
        start(control, 2, ALL.model_copy(update={"canary": ()}))
        assert (await ended(control)).outcome is RolloutOutcome.PROMOTED
    assert lost


async def test_pending_swap_to_the_desired_version_completes_before_a_rollout_starts(control: Control) -> None:
    async with control.run(), control.client() as client, Users(client).asking() as users:
        desired = read_desired(control.store, NAME)
        assert desired is not None
        newer = change_desired(control.store, desired, target(3), target(1))
        entry = AuditEntry(Action.ROLLOUT, f"{NAME}@2", ANN, None)
        begin_rollout(control.store, newer, target(2), ALL, entry)
        seen = await ended(control)
    assert (seen.outcome, seen.previous) == (RolloutOutcome.PROMOTED, target(3)), seen.steps
    assert f"{NAME}@3" in set().union(*users.versions.values())


async def test_rollout_ends_undecided_when_a_step_reaches_its_deadline_without_a_decision(control: Control) -> None:
    async with control.run():
        start(control, 2, ALL.model_copy(update={"shadow": 0, "max_step_s": 0.2}))
        seen = await ended(control)
    assert seen.outcome is RolloutOutcome.UNDECIDED
    assert seen.why is not None and seen.why.startswith("no decision after 0.2 s")


async def test_time_without_a_server_does_not_count_towards_the_deadline_of_a_rollout_step(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.rollout.decision._LOOK_S", 0.01)
    looks: list[Assessment] = []

    def look(evidence: CanaryEvidence) -> Assessment:
        looks.append(evidence_look(evidence))
        return looks[-1]

    evidence_look = CanaryEvidence.assess
    monkeypatch.setattr(CanaryEvidence, "assess", look)
    desired = read_desired(control.store, NAME)
    assert desired is not None
    plan = ALL.model_copy(update={"shadow": 0})
    begun = begin_rollout(control.store, desired, target(2), plan, AuditEntry(Action.ROLLOUT, f"{NAME}@2", ANN, None))
    enter_state(control.store, begun.id, RolloutState.CANARY)
    with control.store.begin() as connection:
        connection.execute(update(RolloutRow).values(step_began_at=datetime.now(UTC) - timedelta(hours=1)))
    async with control.run():
        await until(lambda: len(looks) > 1 or record(control).outcome is not None)
        assert record(control).outcome is None


async def test_rollout_configured_to_hold_at_its_deadline_waits_for_an_operator(control: Control) -> None:
    plan = ALL.model_copy(update={"shadow": 0, "max_step_s": 0.1, "at_deadline": AtDeadline.HOLD})
    async with control.run():
        start(control, 2, plan)
        await until(lambda: any("staying at this step" in step for step in record(control).steps))
        assert record(control).outcome is None
        shown = control.deployment.status()["rollout"]
        assert (shown["version"], shown["state"], shown["canary"]) == (f"{NAME}@2", "canary", 25)
        changes(control, plan).rollback(NAME, reason=None, actor=ANN)
        assert (await ended(control)).outcome is RolloutOutcome.CANCELLED


async def test_warning_that_one_client_sends_most_requests_is_reported_once(control: Control) -> None:
    endless = ALL.model_copy(update={"shadow": 0, "max_errors": 0.001})

    def warnings() -> int:
        return sum("more than half of the requests" in step for step in record(control).steps)

    async def ask(client: httpx.AsyncClient, count: int) -> None:
        for _ in range(count):
            await client.post("/v1/chat/completions", json=BODY | {"user": "batch job"})

    async with control.run(), control.client() as client:
        start(control, 2, endless)
        await until(lambda: record(control).state is RolloutState.CANARY)
        await ask(client, 110)
        await until(lambda: warnings() == 1)
    control.assemble()
    async with control.run(), control.client() as client:
        await until(lambda: control.router.find(NAME, "anyone").assignment is not None)
        await asyncio.sleep(1.2)  # the evidence is read again
        assert warnings() == 1
        changes(control, endless).rollback(NAME, reason=None, actor=ANN)
        await ended(control)


async def test_rollout_fails_before_its_first_step_when_memory_suffices_for_only_one_engine(control: Control) -> None:
    control.park.room = "2 GB are missing"
    async with control.run():
        start(control, 2)
        seen = await ended(control)
    assert seen.outcome is RolloutOutcome.FAILED
    assert seen.why is not None and "not enough memory to run tuned@2" in seen.why
    assert control.reconciler.actual.target == target(1)


async def test_second_promotion_is_refused_while_a_rollout_is_in_progress(control: Control) -> None:
    async with control.run():
        start(control, 2)
        with pytest.raises(BusyError, match=r"a rollout of tuned@2 \(merged\) is in progress"):
            start(control, 3)
        changes(control, ALL).rollback(NAME, reason=None, actor=ANN)
        await ended(control)


async def test_adapter_candidate_runs_in_the_production_engine_without_a_second_engine(make: Make) -> None:
    control = make(format=Format.ADAPTER)
    async with control.run(), control.client() as client, Users(client).asking() as users:
        start(control, 2, ALL)
        seen = await ended(control)
        await control.serves(target(2, Format.ADAPTER))
    assert seen.outcome is RolloutOutcome.PROMOTED, seen.steps
    assert len(control.park.engines) == 1
    assert set(users.statuses) == {200}


async def test_all_engines_serve_the_candidate_after_a_rollout_with_several_engines(make: Make) -> None:
    control = make(replicas=2)
    async with control.run(), control.client() as client, Users(client).asking() as users:
        await until(lambda: len(control.pool.ready) == 2)
        start(control, 2)
        seen = await ended(control)
        assert {engine.target for engine in control.pool.ready} == {target(2)}
        await until(lambda: control.park.alive == 2)
    assert seen.outcome is RolloutOutcome.PROMOTED, seen.steps
    assert set(users.statuses) == {200}


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (RolloutOptions(canary=(50, 25, 100)), "canary steps must be increasing"),
        (RolloutOptions(canary=(5, 25)), "canary steps must be increasing"),
        (RolloutOptions(shadow=-1), "shadow: "),
        (RolloutOptions(shadow=5, direct=True), "a direct promotion has no shadow"),
    ],
)
def test_invalid_rollout_steps_are_rejected(options: RolloutOptions, wrong: str) -> None:
    with pytest.raises(SettingsError, match=wrong):
        options.plan(RolloutSettings())


def test_promotion_options_override_the_configured_rollout_steps() -> None:
    configured = RolloutSettings(shadow=9, canary=(5, 100), min_units=7)
    assert RolloutOptions().plan(configured) == configured
    assert RolloutOptions(direct=True).plan(configured).is_gradual is False
    changed = RolloutOptions(canary=(10, 100)).plan(configured)
    assert (changed.shadow, changed.canary, changed.min_units) == (9, (10, 100), 7)


async def test_state_of_a_running_rollout_is_in_the_status_and_in_the_rollout_view(control: Control) -> None:
    async with control.run(), control.client() as client, Users(client).asking():
        start(control, 2, ALL.model_copy(update={"shadow": 0, "max_errors": 0.001}))
        await until(lambda: record(control).signals)
        view = RolloutView.of(record(control))
        status = await asyncio.to_thread(control.deployment.status)
        changes(control, ALL).rollback(NAME, reason=None, actor=ANN)
        await ended(control)
    assert (view.version, view.previous, view.state, view.canary) == (f"{NAME}@2", ONE, RolloutState.CANARY, 25)
    assert {signal.signal for signal in view.signals} == {"errors", "first_token"}
    assert RolloutView.model_validate_json(view.model_dump_json()) == view
    assert status["rollout"]["state"] == "canary"
