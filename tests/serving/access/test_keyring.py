"""Tests that keys are created with the requested properties, and that their secrets are not stored."""

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine as Store

from serving.access.keyring import Keyring
from svc.errors import NotFoundError, RefusedError, SettingsError
from svc.identity.key_secret import hash_secret, key_id_of
from svc.identity.principal import Limits, Principal, Scope
from svc.store.audit import read_events
from svc.store.keys import read_keys
from tests.builders.actors import ALICE
from tests.new_store import new_store
from tests.serving.access.conftest import Clock

INFER = frozenset({Scope.INFER})


def test_created_key_has_the_requested_properties(keyring: Keyring, store: Store, clock: Clock) -> None:
    until = clock.at + timedelta(days=1)
    limits = Limits(requests_per_minute=60, tokens_per_day=10_000)
    issued = keyring.create(
        INFER, name="ci", models=frozenset({"tickets"}), limits=limits, weight=3, expires_at=until, reason="why"
    )
    assert issued.key.principal == Principal(issued.key.id, "ci", INFER, frozenset({"tickets"}), limits, 3)
    assert (issued.key.created_at, issued.key.expires_at) == (clock.at, until)
    assert read_keys(store) == [issued.key]


def test_key_without_a_name_is_named_after_its_id(keyring: Keyring) -> None:
    key = keyring.create(INFER).key
    assert key.principal.name == key.id


def test_secret_contains_its_key_id_and_matches_the_stored_hash(keyring: Keyring) -> None:
    issued = keyring.create(INFER)
    assert key_id_of(issued.secret) == issued.key.id
    assert issued.key.hash == hash_secret(issued.secret)


def test_secret_is_in_neither_stored_files_nor_object_reprs(tmp_path: Path) -> None:
    keyring = Keyring(new_store(tmp_path / "home"), ALICE)
    issued = keyring.create(INFER)
    rotated = keyring.rotate(issued.key.id)
    written = b"".join(path.read_bytes() for path in (tmp_path / "home").iterdir())
    for secret in (issued.secret, rotated.secret):
        assert secret[12:].encode() not in written
        assert secret not in repr(issued) + repr(rotated)


def test_new_key_is_recorded_in_the_audit_log(keyring: Keyring, store: Store) -> None:
    issued = keyring.create(INFER, name="ci", limits=Limits(concurrent=4), reason="for ci")
    (event,) = read_events(store, newest=9)
    assert (event.subject, event.actor, event.origin) == (f"key:{issued.key.id}", "user:alice", "box")
    assert event.reason == "for ci"
    assert event.details["limits"] == {"concurrent": 4}
    assert event.details["scopes"] == ["infer"]


@pytest.mark.parametrize("name", ["", " ", "a b", "-x", "x" * 64, "ts_abcd0123", "a\nb", "[bold]"])
def test_invalid_key_name_is_rejected(keyring: Keyring, name: str) -> None:
    with pytest.raises(SettingsError, match="is not valid"):
        keyring.create(INFER, name=name)


@pytest.mark.parametrize("model", ["tickets@2", "", "a b", "../x"])
def test_invalid_model_name_is_rejected(keyring: Keyring, model: str) -> None:
    with pytest.raises(SettingsError, match="is not a valid model name"):
        keyring.create(INFER, models=frozenset({model}))


def test_key_with_an_expiry_time_that_is_not_in_the_future_is_rejected(keyring: Keyring, clock: Clock) -> None:
    with pytest.raises(SettingsError, match="is in the past"):
        keyring.create(INFER, expires_at=clock.at)


def test_rotation_gives_the_same_key_a_new_secret(keyring: Keyring, clock: Clock) -> None:
    issued = keyring.create(INFER, name="ci")
    rotated = keyring.rotate("ci", grace=timedelta(hours=1))
    assert rotated.key.principal == issued.key.principal
    assert rotated.key.hash == hash_secret(rotated.secret) != issued.key.hash
    assert (rotated.key.previous_hash, rotated.key.previous_until) == (issued.key.hash, clock.at + timedelta(hours=1))


def test_rotating_an_expired_key_fails(keyring: Keyring, clock: Clock) -> None:
    keyring.create(INFER, name="ci", expires_at=clock.at + timedelta(hours=1))
    clock.forward(hours=1)
    with pytest.raises(RefusedError, match="has expired"):
        keyring.rotate("ci")


def test_revoked_key_stores_its_revocation_time(keyring: Keyring, clock: Clock) -> None:
    keyring.create(INFER, name="ci")
    assert keyring.revoke("ci", reason="leaked").revoked_at == clock.at


@pytest.mark.parametrize("change", [Keyring.rotate, Keyring.revoke])
def test_changing_an_unknown_key_fails(keyring: Keyring, store: Store, change: object) -> None:
    with pytest.raises(NotFoundError):
        change(keyring, "nobody")  # type: ignore[operator]
    assert read_events(store, newest=9) == []
