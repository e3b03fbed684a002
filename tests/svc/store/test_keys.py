"""Tests that keys are stored without their secrets, and change only together with an event."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.orm import Session

from svc.errors import NotFoundError, RefusedError
from svc.identity.principal import Limits, Principal, Scope
from svc.store.audit import Action, AuditEntry, read_events
from svc.store.keys import Key, add_key, find_key, keys_revision, read_keys, replace_secret, revoke_key
from svc.store.tables import KeyRow
from tests.builders.actors import ALICE

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
CI = Principal(
    "abcd0123",
    "ci",
    frozenset({Scope.INFER, Scope.FEEDBACK}),
    frozenset({"tickets", "reviews"}),
    Limits(60, 10_000, 5_000, 4, 2**40),
    weight=3,
)
KEY = Key(CI, "hash-1", created_at=NOON, expires_at=NOON + timedelta(days=1))
ENTRY = AuditEntry(Action.CREATE_KEY, "key:abcd0123", ALICE)


def test_new_store_has_no_api_keys(store: Store) -> None:
    assert (read_keys(store), keys_revision(store)) == ([], 0)


def test_written_api_key_round_trips(store: Store) -> None:
    add_key(store, KEY, ENTRY)
    assert read_keys(store) == [KEY]


def test_api_key_without_limits_or_models_round_trips(store: Store) -> None:
    key = Key(Principal("abcd0123", "x", frozenset({Scope.ADMIN})), "hash", created_at=NOON)
    add_key(store, key, ENTRY)
    assert read_keys(store) == [key]


def test_every_api_key_limit_has_a_database_column() -> None:
    assert set(Limits.__dataclass_fields__) <= set(KeyRow.__table__.columns.keys())


def test_every_api_key_change_is_audited_and_increments_the_shared_key_revision(store: Store) -> None:
    add_key(store, KEY, ENTRY)
    replace_secret(store, KEY.id, "hash-2", previous_until=NOON, entry=replace(ENTRY, action=Action.ROTATE_KEY))
    revoke_key(store, KEY.id, at=NOON, entry=replace(ENTRY, action=Action.REVOKE_KEY))
    assert keys_revision(store) == 3
    assert [event.action for event in read_events(store, newest=9)] == ["key.create", "key.rotate", "key.revoke"]


def test_rotated_api_key_keeps_its_previous_secret(store: Store) -> None:
    add_key(store, KEY, ENTRY)
    replace_secret(store, KEY.id, "hash-2", previous_until=NOON, entry=ENTRY)
    assert find_key(store, KEY.id) == replace(KEY, hash="hash-2", previous_hash="hash-1", previous_until=NOON)


@pytest.mark.parametrize("principal", [replace(CI, key_id="other000"), replace(CI, name="other")])
def test_api_key_ids_and_names_are_unique(store: Store, principal: Principal) -> None:
    add_key(store, KEY, ENTRY)
    with pytest.raises(RefusedError, match="already"):
        add_key(store, replace(KEY, principal=principal), ENTRY)
    assert len(read_events(store, newest=9)) == len(read_keys(store)) == 1


def test_name_of_a_revoked_api_key_can_be_reused_for_a_new_key(store: Store) -> None:
    add_key(store, KEY, ENTRY)
    revoke_key(store, KEY.id, at=NOON, entry=ENTRY)
    with pytest.raises(NotFoundError):
        find_key(store, "ci")
    add_key(store, replace(KEY, principal=replace(CI, key_id="other000")), ENTRY)
    assert find_key(store, "ci").id == "other000"
    assert find_key(store, KEY.id).revoked_at == NOON


def test_api_key_lookup_prefers_an_id_over_an_equal_name(store: Store) -> None:
    add_key(store, KEY, ENTRY)
    add_key(store, replace(KEY, principal=replace(CI, key_id="other000", name=KEY.id)), ENTRY)
    assert find_key(store, KEY.id).principal.name == "ci"


def test_revoked_api_key_cannot_be_rotated_or_revoked_again(store: Store) -> None:
    add_key(store, KEY, ENTRY)
    revoke_key(store, KEY.id, at=NOON, entry=ENTRY)
    with pytest.raises(RefusedError, match="has been revoked"):
        revoke_key(store, KEY.id, at=NOON, entry=ENTRY)
    with pytest.raises(RefusedError, match="has been revoked"):
        replace_secret(store, KEY.id, "hash-2", previous_until=NOON, entry=ENTRY)
    assert len(read_events(store, newest=9)) == 2


def test_error_does_not_quote_a_secret_passed_as_an_api_key_id(store: Store) -> None:
    secret = "ts_abcd0123_0123456789abcdefghijklmnopqrstuvwxyz01"
    with pytest.raises(NotFoundError) as raised:
        find_key(store, secret)
    assert "0123456789abc" not in str(raised.value)


def test_printed_api_key_does_not_contain_its_hash(store: Store) -> None:
    assert "hash-1" not in repr(replace(KEY, previous_hash="hash-1"))


def test_api_key_row_contains_the_hash_and_only_the_granted_scopes(store: Store) -> None:
    add_key(store, KEY, ENTRY)
    with Session(store) as session:
        row = session.scalars(select(KeyRow)).one()
        assert (row.hash, row.scopes, row.models) == ("hash-1", "feedback infer", "reviews tickets")


@pytest.mark.parametrize(("when", "usable"), [(NOON, True), (NOON + timedelta(days=1), False)])
def test_api_key_is_valid_until_it_expires(when: datetime, usable: bool) -> None:
    assert KEY.usable(when) is usable
