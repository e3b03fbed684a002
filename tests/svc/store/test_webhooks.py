"""Tests that each transition of a rollout is stored as one message per webhook."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store

from svc.settings.rollout import RolloutSettings
from svc.store.audit import Action, AuditEntry
from svc.store.desired import change_desired
from svc.store.rollouts import RolloutOutcome, RolloutState, begin_rollout, end_rollout, enter_state
from svc.store.webhooks import drop_deliveries, due_deliveries
from svc.version import Format, Target, VersionId
from tests.builders.actors import ANN

URLS = ("https://one.example/hook", "https://two.example/hook")


def target(number: int) -> Target:
    return Target(VersionId("tickets", number), Format.GPTQ)


@pytest.fixture
def rollout(store: Store) -> int:
    """Return the id of a requested rollout."""
    seen = change_desired(store, None, target(1), None)
    entry = AuditEntry(Action.PROMOTE, "tickets@2", ANN, "better")
    return begin_rollout(store, seen, target(2), RolloutSettings(shadow=9, canary=(5, 25, 100)), entry).id


def types(store: Store, url: str = URLS[0]) -> list[str]:
    return [json.loads(each.body)["type"] for each in due_deliveries(store, url, 99)]


def test_each_rollout_event_is_reported_once_to_each_webhook(store: Store, rollout: int) -> None:
    for state, step in (
        (RolloutState.LOADING, 0),
        (RolloutState.SHADOW, 0),
        (RolloutState.SHADOW, 0),  # entered again after a restart
        (RolloutState.CANARY, 0),
        (RolloutState.CANARY, 1),
        (RolloutState.SWITCHING, 0),
    ):
        enter_state(store, rollout, state, step, webhooks=URLS)
    end_rollout(store, rollout, RolloutOutcome.PROMOTED, None, webhooks=URLS)
    expected = ["requested", "shadow", "canary", "canary", "promoted"]
    for url in URLS:
        assert types(store, url) == [f"rollout.{name}" for name in expected]
    messages = [each.message for url in URLS for each in due_deliveries(store, url, 99)]
    assert len(set(messages)) == len(expected)
    bodies = [json.loads(each.body) for each in due_deliveries(store, URLS[0], 99)]
    assert [body["data"]["canary"] for body in bodies] == [None, None, 5, 25, None]


@pytest.mark.parametrize("outcome", RolloutOutcome)
def test_every_rollout_outcome_is_reported_to_webhooks_with_its_reason(
    store: Store, rollout: int, outcome: RolloutOutcome
) -> None:
    end_rollout(store, rollout, outcome, "a reason", webhooks=URLS)
    assert types(store) == ["rollout.requested", f"rollout.{outcome}"]
    data = json.loads(due_deliveries(store, URLS[0], 99)[1].body)["data"]
    assert (data["version"], data["previous"], data["outcome"], data["why"], data["actor"]) == (
        "tickets@2",
        "tickets@1",
        outcome,
        "a reason",
        "user:ann",
    )


def test_no_message_is_stored_when_no_webhooks_are_configured(store: Store, rollout: int) -> None:
    enter_state(store, rollout, RolloutState.SHADOW)
    end_rollout(store, rollout, RolloutOutcome.FAILED, "a reason")
    assert types(store) == []


@pytest.mark.parametrize(("age", "keep"), [(timedelta(days=-1), 9), (timedelta(days=1), 0)], ids=["old", "too_many"])
def test_dropping_the_messages_of_one_webhook_does_not_affect_other_webhooks(
    store: Store, rollout: int, age: timedelta, keep: int
) -> None:
    end_rollout(store, rollout, RolloutOutcome.FAILED, "a reason", webhooks=URLS)
    waiting = types(store, URLS[1])
    assert drop_deliveries(store, URLS[0], before=datetime.now(UTC) - age, keep=keep) == len(waiting)
    assert types(store, URLS[0]) == []
    assert types(store, URLS[1]) == waiting
