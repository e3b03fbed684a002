"""Tests `svc audit`, `svc history` and `svc forget` as commands."""

import io
import json
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store

from serving.rollout.served import Began, begin_serving
from svc.errors import IntegrityError, NotFoundError
from svc.settings.rollout import RolloutSettings
from svc.store.audit import Action, AuditEntry, read_events, record_event, verify_chain
from svc.store.desired import change_desired, read_desired
from svc.store.requests import add_requests, hash_user
from svc.store.rollouts import RolloutOutcome, begin_rollout, end_rollout, store_signals
from svc.version import Format, Target, VersionId
from tests.builders.actors import ALICE
from tests.builders.requests import RECORD, kept
from tests.builders.signals import LOSS
from tests.command_line import Svc


@pytest.fixture
def three(store: Store) -> Store:
    """Return a store with three events."""
    for number in (1, 2):
        record_event(store, AuditEntry(Action.PROMOTE, f"tickets@{number}", ALICE, "[bold]", {"before": None}))
    record_event(store, AuditEntry(Action.REVOKE_KEY, "key:abcd0123", ALICE, "leaked", {"name": "ci"}))
    return store


def test_showing_an_empty_audit_log_is_not_an_error(svc: Svc) -> None:
    result = svc("audit")
    assert (result.code, result.out) == (0, "no matching events\n")


def test_audit_table_shows_actor_action_origin_and_reason(svc: Svc, three: Store) -> None:
    lines = svc("audit").out.splitlines()
    assert len(lines) == 4
    for text in ("user:alice", "box", "promote", "tickets@2", "[bold]"):
        assert text in lines[2]
    assert "name ci" in lines[3]


def test_audit_json_output_has_all_fields(svc: Svc, three: Store) -> None:
    rows = json.loads(svc("audit", "--json").out)
    assert [(row["id"], row["subject"]) for row in rows] == [(1, "tickets@1"), (2, "tickets@2"), (3, "key:abcd0123")]
    assert rows[2]["details"] == {"name": "ci"}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--last", "1"], [3]),
        (["--action", "promote"], [1, 2]),
        (["--subject", "tickets"], [1, 2]),
        (["--since", "1h"], [1, 2, 3]),
        (["--since", "2999-01-01"], []),
    ],
)
def test_audit_events_can_be_filtered(svc: Svc, three: Store, options: list[str], found: list[int]) -> None:
    assert [row["id"] for row in json.loads(svc("audit", "--json", *options).out)] == found


def test_unaltered_audit_log_passes_verification(svc: Svc, three: Store) -> None:
    result = svc("audit", "--verify")
    assert result.code == 0
    assert "unaltered events: 3" in result.out
    assert verify_chain(three).head in result.out


def test_altered_audit_log_is_reported_with_the_first_wrong_row(svc: Svc, three: Store) -> None:
    with three.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER audit_no_UPDATE")
        connection.exec_driver_sql("UPDATE audit SET actor = 'user:bob' WHERE id >= 2")
    result = svc("audit", "--verify")
    assert result.code == IntegrityError.exit_code
    assert "the first altered row is 2" in result.err
    told = svc("audit", "--verify", "--json")
    assert told.code == IntegrityError.exit_code
    assert json.loads(told.out)["fault"]["id"] == 2


def test_audit_verification_fails_if_the_expected_hash_is_not_in_the_log(svc: Svc, three: Store) -> None:
    assert svc("audit", "--verify", "--expect", verify_chain(three).head).code == 0
    assert svc("audit", "--verify", "--expect", "0" * 64).code == IntegrityError.exit_code
    assert svc("audit", "--expect", "x").code == 2


@pytest.fixture
def served(store: Store) -> Store:
    """Return a store with two versions that were served, the second of which still is."""
    first = change_desired(store, None, Target(VersionId("tickets", 1), Format.GPTQ), None)
    begin_serving(store, first, Began.START, at=datetime(2026, 1, 2, 12, tzinfo=UTC))
    entry = AuditEntry(Action.PROMOTE, "tickets@2", ALICE, "it is better")
    second = change_desired(store, first, Target(VersionId("tickets", 2), Format.GPTQ), first.target, entry=entry)
    begin_serving(store, second, Began.SWAP, at=datetime(2026, 1, 3, 12, tzinfo=UTC))
    return store


def test_history_shows_which_version_was_served_when(svc: Svc, served: Store) -> None:
    first, second = svc("history", "tickets").out.splitlines()[1:]
    assert first.split() == ["2026-01-02", "12:00:00", "2026-01-03", "12:00:00", "tickets@1", "gptq", "start", "swap"]
    assert second.split() == ["2026-01-03", "12:00:00", "tickets@2", "gptq", "swap", "user:alice", "it", "is", "better"]


def test_history_shows_why_a_rollout_ended(svc: Svc, served: Store) -> None:
    seen = read_desired(served, "tickets")
    assert seen is not None
    entry = AuditEntry(Action.PROMOTE, "tickets@3", ALICE, "again")
    tried = begin_rollout(served, seen, Target(VersionId("tickets", 3), Format.GPTQ), RolloutSettings(shadow=9), entry)
    store_signals(served, tried.id, (LOSS,))
    end_rollout(served, tried.id, RolloutOutcome.ROLLED_BACK, "worse")
    lines = svc("history", "tickets").out.splitlines()[3:]
    assert lines[0].split()[4:9] == ["tickets@3", "gptq", "rollout", "rolled_back", "user:alice"]
    reasons = " ".join(" ".join(line.split("user:alice")[-1].split()) for line in lines)
    assert reasons.strip() == "again; worse; invalid failed"


def test_history_is_available_as_json(svc: Svc, served: Store) -> None:
    rows = json.loads(svc("history", "tickets", "--json").out)
    assert [(row["version"], row["who"], row["until"]) for row in rows] == [
        ("tickets@1", None, "2026-01-03T12:00:00.000+00:00"),
        ("tickets@2", "user:alice", None),
    ]


def test_model_that_was_never_served_has_no_history(svc: Svc) -> None:
    assert svc("history", "nobody").code == NotFoundError.exit_code
    assert json.loads(svc("history", "nobody", "--json").out) == []


@pytest.fixture
def requested(svc: Svc, store: Store) -> str:
    """Return the id of a key with one request from a user. Another request today has neither key nor user."""
    key_id: str = json.loads(svc("keys", "create", "--name", "ci", "--json").out)["key_id"]
    mine = RECORD._replace(request_id="mine", key_id=key_id, user_hash=hash_user("a@b.de"), prompt="secret")
    add_requests(store, [mine, RECORD._replace(request_id="other", started_at=datetime.now(UTC))])
    return key_id


@pytest.mark.parametrize(
    "options",
    [["--user", "a@b.de"], ["--key", "ci"], ["--before", "1h"], ["--before", f"{datetime.now(UTC):%Y-%m-%d}"]],
)
def test_forget_command_deletes_matching_requests_and_records_their_number_in_the_audit_log(
    svc: Svc, store: Store, requested: str, options: list[str]
) -> None:
    result = svc("forget", *options, "--yes", "--reason", "article 17")
    assert result.out == "deleted 1 requests, 1 with content, 0 with feedback\n"
    assert kept(store) == ["other"]
    event = read_events(store, newest=1)[0]
    assert (event.action, event.reason) == ("forget", "article 17")
    assert event.details == {"requests": 1, "contents": 1, "feedback": 0}


def test_audit_log_does_not_name_a_forgotten_user(svc: Svc, store: Store, requested: str) -> None:
    svc("forget", "--user", "a@b.de", "--yes")
    assert read_events(store, newest=1)[0].subject == f"user:{hash_user('a@b.de')}"
    assert "a@b.de" not in svc("audit", "--json").out


def test_forget_command_deletes_nothing_without_confirmation(
    svc: Svc, store: Store, requested: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    result = svc("forget", "--key", requested)
    assert result.code == 130
    assert "1 requests will be deleted; 1 have stored content" in result.err
    assert len(kept(store)) == 2
    assert read_events(store, newest=1)[0].action == "key.create"


def test_forget_command_with_the_json_option_requires_the_yes_option_and_prints_the_counts(
    svc: Svc, requested: str
) -> None:
    assert svc("forget", "--key", requested, "--json").code == 2
    output = json.loads(svc("forget", "--key", requested, "--yes", "--json").out)
    assert output == {"requests": 1, "contents": 1, "feedback": 0}


@pytest.mark.parametrize("options", [[], ["--user", "a", "--key", "b"], ["--before", "1d", "--user", ""]])
def test_forget_command_requires_exactly_one_selection_option(svc: Svc, options: list[str]) -> None:
    result = svc("forget", *options, "--yes")
    assert (result.code, "give exactly one of" in result.err) == (2, True)


def test_forget_command_fails_for_an_unknown_key(svc: Svc) -> None:
    assert svc("forget", "--key", "nobody", "--yes").code == NotFoundError.exit_code


def test_forget_command_deletes_all_requests_if_the_before_date_is_in_the_future(
    svc: Svc, store: Store, requested: str
) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    assert "deleted 2 requests" in svc("forget", "--before", tomorrow.isoformat(), "--yes").out
