"""Tests which version was served when, which rollouts there were, and who requested them."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store

from serving.audit.history import read_history
from serving.rollout.served import Began, begin_serving, end_serving
from svc.settings.rollout import RolloutSettings
from svc.store.audit import Action, AuditEntry, record_event
from svc.store.desired import Desired, change_desired
from svc.store.leases import report_server
from svc.store.rollouts import RolloutOutcome, begin_rollout, end_rollout, store_signals
from svc.version import Format, Target, VersionId
from tests.builders.actors import ALICE
from tests.builders.signals import LOSS

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


def target(number: int) -> Target:
    return Target(VersionId("tickets", number), Format.GPTQ)


def minute(number: int) -> datetime:
    return NOON + timedelta(minutes=number)


def test_history_is_empty_if_nothing_was_ever_served(store: Store) -> None:
    assert read_history(store, "tickets") == []


def test_history_shows_the_action_and_reason_for_each_version(store: Store) -> None:
    first = change_desired(store, None, target(1), None, entry=AuditEntry(Action.SERVE, "tickets@1", ALICE))
    begin_serving(store, first, Began.START)
    entry = AuditEntry(Action.PROMOTE, "tickets@2", ALICE, "it is better")
    begin_serving(store, change_desired(store, first, target(2), first.target, entry=entry), Began.SWAP)
    found = read_history(store, "tickets")
    assert [(row["action"], row["why"]) for row in found] == [
        ("serve", None),
        ("promote", "it is better"),
    ]


@pytest.mark.parametrize("subject", ["reviews@1", "tickets2@1"])
def test_each_model_has_its_own_history(store: Store, subject: str) -> None:
    begin_serving(store, Desired(target(1), None, 1), Began.START)
    record_event(store, AuditEntry(Action.PROMOTE, subject, ALICE, details={"generation": 1}))
    (row,) = read_history(store, "tickets")
    assert row["action"] is None


def test_history_does_not_attribute_a_server_startup_to_an_unrelated_version_removal(store: Store) -> None:
    begin_serving(store, Desired(target(1), None, 1), Began.START)
    record_event(store, AuditEntry(Action.REMOVE_VERSION, "tickets@9", ALICE, details={"generation": 1}))
    assert read_history(store, "tickets")[0]["action"] is None


def test_history_shows_a_rollout_and_its_verdicts_between_the_versions_served_before_and_after(store: Store) -> None:
    first = change_desired(store, None, target(1), None)
    begin_serving(store, first, Began.START, at=minute(0))
    entry = AuditEntry(Action.PROMOTE, "tickets@2", ALICE, "it is better")
    tried = begin_rollout(store, first, target(2), RolloutSettings(canary=(5, 100)), entry)
    store_signals(store, tried.id, (LOSS,))
    end_rollout(store, tried.id, RolloutOutcome.ROLLED_BACK, "invalid JSON 30.0% instead of 0.0%")
    later = datetime.now(UTC) + timedelta(minutes=1)
    begin_serving(store, change_desired(store, first, target(3), first.target), Began.SWAP, at=later)
    rows = read_history(store, "tickets")
    assert [(row["event"], row["version"]) for row in rows] == [
        ("served", "tickets@1"),
        ("rollout", "tickets@2"),
        ("served", "tickets@3"),
    ]
    row = rows[1]
    assert (row["who"], row["why"], row["ended_by"]) == ("user:alice", "it is better", "rolled_back")
    assert row["rollout"]["why"] == "invalid JSON 30.0% instead of 0.0%"
    assert [(signal["signal"], signal["outcome"]) for signal in row["rollout"]["signals"]] == [("invalid", "failed")]
    assert set(row) == set(rows[0])


def test_running_rollout_has_no_end_in_the_history(store: Store) -> None:
    first = change_desired(store, None, target(1), None)
    begin_rollout(store, first, target(2), RolloutSettings(shadow=9), AuditEntry(Action.PROMOTE, "tickets@2", ALICE))
    (row,) = read_history(store, "tickets")
    assert (row["until"], row["ended_by"], row["rollout"]["state"]) == (None, None, "requested")


def test_history_has_one_row_for_a_version_that_several_servers_serve(postgresql_store: Store) -> None:
    store = postgresql_store
    first = change_desired(store, None, target(1), None)
    second = change_desired(store, first, target(2), first.target)
    for server, at in (("a", 0), ("b", 1)):
        report_server(store, server, f"{server}:8000", [])
        begin_serving(store, first, Began.START, at=minute(at), server=server)
    for server, at in (("a", 5), ("b", 6)):
        begin_serving(store, second, Began.SWAP, at=minute(at), server=server)
    end_serving(store, "tickets", at=minute(9), server="a")
    rows = [(row["version"], row["from"], row["until"], row["ended_by"]) for row in read_history(store, "tickets")]
    times = [minute(at).isoformat(timespec="milliseconds") for at in (0, 5, 6)]
    assert rows == [("tickets@1", times[0], times[2], "swap"), ("tickets@2", times[1], None, None)]


def test_restart_of_the_only_server_has_its_own_row_in_the_history(postgresql_store: Store) -> None:
    first = change_desired(postgresql_store, None, target(1), None)
    for server, at in (("a", 0), ("a-again", 5)):
        report_server(postgresql_store, server, "a:8000", [])
        begin_serving(postgresql_store, first, Began.START, at=minute(at), server=server)
        end_serving(postgresql_store, "tickets", at=minute(at + 5), server=server)
    assert [row["ended_by"] for row in read_history(postgresql_store, "tickets")] == ["stop", "stop"]
