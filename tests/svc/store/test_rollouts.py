"""The stored state of rollouts."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store

from serving.rollout.analysis.units import Arm
from serving.rollout.assigned_requests import read_assigned, unit_text
from svc.errors import BusyError
from svc.settings.rollout import RolloutSettings
from svc.store.audit import Action, AuditEntry, read_events
from svc.store.desired import Desired, change_desired, read_desired
from svc.store.leases import Lease, LeaseLostError, remove_server, report_server
from svc.store.requests import RequestOutcome, RequestRecord, add_requests
from svc.store.rollouts import (
    RolloutOutcome,
    RolloutRecord,
    RolloutState,
    active_rollout,
    begin_rollout,
    end_rollout,
    enter_state,
    find_rollout,
    stop_rollout,
    store_signals,
    switch_rollout,
)
from svc.version import Format, Target, VersionId
from tests.builders.actors import ANN

ONE, TWO, THREE = (Target(VersionId("tuned", number), Format.MERGED) for number in (1, 2, 3))
PLAN = RolloutSettings(canary=(5, 100))


def begin(store: Store) -> tuple[Desired, RolloutRecord]:
    desired = read_desired(store, "tuned") or change_desired(store, None, ONE, None)
    return desired, begin_rollout(store, desired, TWO, PLAN, AuditEntry(Action.ROLLOUT, str(TWO.version), ANN))


def stop(store: Store) -> RolloutRecord | None:
    return stop_rollout(store, "tuned", "a feeling", AuditEntry(Action.ROLLBACK, str(ONE.version), ANN))


def test_rollout_is_rejected_while_another_rollout_of_the_same_model_is_running(store: Store) -> None:
    _, first = begin(store)
    with pytest.raises(BusyError, match=r"a rollout of tuned@2 \(merged\) is in progress"):
        begin(store)
    end_rollout(store, first.id, RolloutOutcome.UNDECIDED, "no data")
    assert active_rollout(store, "tuned") is None
    begin(store)


def test_final_rollout_step_promotes_the_candidate_and_writes_an_audit_entry(store: Store) -> None:
    _, record = begin(store)
    switched = switch_rollout(store, record)
    assert switched is not None and switched.state is RolloutState.SWITCHING
    desired = read_desired(store, "tuned")
    assert desired is not None and (desired.target, desired.previous) == (TWO, ONE)
    assert [(event.action, event.actor) for event in read_events(store, newest=2)] == [
        ("rollout", "user:ann"),
        ("promote", "user:ann"),
    ]


def test_stopped_rollout_cannot_promote_its_candidate(store: Store) -> None:
    _, record = begin(store)
    assert stop(store) is not None
    assert switch_rollout(store, record) is None
    desired = read_desired(store, "tuned")
    assert desired is not None and desired.target == ONE


def test_rollout_cannot_promote_its_candidate_after_another_promotion(store: Store) -> None:
    desired, record = begin(store)
    change_desired(store, desired, THREE, ONE)
    assert switch_rollout(store, record) is None


def test_rollout_cannot_be_stopped_after_its_final_swap_has_begun(store: Store) -> None:
    _, record = begin(store)
    switch_rollout(store, record)
    assert stop(store) is None


Write = Callable[[Store, RolloutRecord, Lease], object]


@pytest.mark.parametrize(
    "write",
    [
        lambda store, record, lease: enter_state(store, record.id, RolloutState.CANARY, lease=lease),
        lambda store, record, lease: store_signals(store, record.id, (), lease=lease),
        lambda store, record, lease: switch_rollout(store, record, lease=lease),
        lambda store, record, lease: end_rollout(store, record.id, RolloutOutcome.PROMOTED, None, lease=lease),
    ],
    ids=["state", "signals", "switch", "outcome"],
)
def test_write_is_rejected_and_changes_nothing_after_another_server_has_taken_the_lease(
    any_store: Store, write: Write
) -> None:
    desired, record = begin(any_store)
    lost = report_server(any_store, "first", "gpu-1:8000", ["tuned"])["tuned"]
    remove_server(any_store, "first")
    held = report_server(any_store, "second", "gpu-2:8000", ["tuned"])["tuned"]
    with pytest.raises(LeaseLostError):
        write(any_store, record, lost)
    assert find_rollout(any_store, "tuned") == record
    assert read_desired(any_store, "tuned") == desired
    write(any_store, record, held)


def test_each_request_of_a_rollout_is_read_once_and_in_order(store: Store) -> None:
    _, record = begin(store)
    row = RequestRecord(
        request_id="r",
        started_at=datetime.now(UTC) + timedelta(seconds=1),
        model="tuned",
        version=TWO.version,
        format=Format.MERGED,
        route="/v1/chat/completions",
        status=200,
        outcome=RequestOutcome.COMPLETE,
        seconds=0.5,
    )
    own = [unit_text(record.id, "ab", candidate=True), unit_text(record.id, "", candidate=False)]
    others = [None, unit_text(record.id + 1, "ab", candidate=True)]
    add_requests(store, [replace_unit(row, unit) for unit in (own[0], *others, own[1])])
    first, second = read_assigned(store, record, 0)
    assert (first.arm, first.unit, second.arm, second.unit) == (Arm.CANDIDATE, "ab", Arm.PRODUCTION, None)
    assert read_assigned(store, record, first.id) == [second]
    assert read_assigned(store, record, second.id) == []


def replace_unit(row: RequestRecord, unit: str | None) -> RequestRecord:
    return row._replace(unit=unit)
