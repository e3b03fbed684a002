"""Tests which version was served when and who requested it, including the time before serving was recorded."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store

from svc.audit.history import read_history
from svc.identity.actor import Actor
from svc.store.audit import Action, AuditEntry, record_event
from svc.store.desired import Desired, change_desired
from svc.store.served import Began, begin_serving
from svc.version import Format, Target, VersionId

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
ALICE = Actor("user:alice", "box")


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


def test_removing_a_version_is_not_shown_as_the_cause_of_a_start(store: Store) -> None:
    begin_serving(store, Desired(target(1), None, 1), Began.START)
    record_event(store, AuditEntry(Action.REMOVE_VERSION, "tickets@9", ALICE, details={"generation": 1}))
    assert read_history(store, "tickets")[0]["action"] is None
