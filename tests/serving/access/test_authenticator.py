"""Tests that valid secrets pass at once, others fail with a reason, and changes apply at the next check."""

import asyncio
import gc
import logging
import threading
import weakref
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from serving.access import authenticator as authenticator_module
from serving.access.authenticator import LOOK_S, Authenticator, InvalidKeyError, KeyFault, KeysUnavailableError
from serving.access.keyring import IssuedKey, Keyring
from serving.store_changes.changes import FALLBACK_POLL_S, Changes
from svc.identity.key_secret import new_secret
from svc.identity.principal import Scope
from svc.store.keys import keys_revision
from tests.builders.actors import ALICE
from tests.event_loop import blocked_default_executor
from tests.serving.access.conftest import Clock

INFER = frozenset({Scope.INFER})


@pytest.fixture
def issued(keyring: Keyring, clock: Clock) -> IssuedKey:
    return keyring.create(INFER, name="ci", expires_at=clock.at + timedelta(days=1))


@pytest.fixture
def authenticator(store: Store, clock: Clock, issued: IssuedKey) -> Authenticator:
    """Return an authenticator that has read the keys once."""
    made = Authenticator(store, now=clock.now, clock=clock.monotonic)
    made.refresh()
    return made


def fault_of(authenticator: Authenticator, secret: str | None) -> KeyFault:
    with pytest.raises(InvalidKeyError) as raised:
        authenticator.grant(secret)
    if secret:
        assert secret[12:] not in f"{raised.value} {raised.value!r} {raised.value.args}" or len(secret) < 13
    return raised.value.fault


def test_valid_secret_identifies_the_principal_of_its_key(authenticator: Authenticator, issued: IssuedKey) -> None:
    assert authenticator.grant(issued.secret).principal == issued.key.principal


@pytest.mark.parametrize("secret", [None, ""])
def test_request_without_a_secret_is_rejected_with_the_reason(authenticator: Authenticator, secret: str | None) -> None:
    assert fault_of(authenticator, secret) is KeyFault.MISSING


@pytest.mark.parametrize("secret", ["none", "sk-0123456789abcdef0123456789", "ts_", "é", "Bearer x", "x" * 100_000])
def test_text_that_is_not_a_secret_is_rejected_with_the_reason(authenticator: Authenticator, secret: str) -> None:
    assert fault_of(authenticator, secret) is KeyFault.MALFORMED


def test_mistyped_secret_is_reported_as_malformed(authenticator: Authenticator, issued: IssuedKey) -> None:
    last = issued.secret[-1]
    assert fault_of(authenticator, issued.secret[:-1] + ("a" if last != "a" else "b")) is KeyFault.MALFORMED


@pytest.mark.parametrize("key_id", [None, "nobody00"])
def test_well_formed_but_unknown_secret_is_rejected(
    authenticator: Authenticator, issued: IssuedKey, key_id: str | None
) -> None:
    assert fault_of(authenticator, new_secret(key_id or issued.key.id)) is KeyFault.UNKNOWN


def test_wrong_secret_does_not_reveal_the_state_of_its_key(
    authenticator: Authenticator, issued: IssuedKey, keyring: Keyring
) -> None:
    keyring.revoke(issued.key.id)
    authenticator.refresh()
    assert fault_of(authenticator, new_secret(issued.key.id)) is KeyFault.UNKNOWN


def test_revocation_takes_effect_at_the_next_check(
    authenticator: Authenticator, issued: IssuedKey, keyring: Keyring
) -> None:
    keyring.revoke("ci")
    authenticator.refresh()
    assert fault_of(authenticator, issued.secret) is KeyFault.REVOKED


def test_revocation_takes_effect_even_if_the_keys_could_not_be_read_at_first(
    authenticator: Authenticator, issued: IssuedKey, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(store: Store) -> None:
        raise OperationalError("", None, OSError())

    keyring.revoke("ci")
    with monkeypatch.context() as patch:
        patch.setattr(authenticator_module, "read_keys", fail)
        with pytest.raises(OperationalError):
            authenticator.refresh()
    authenticator.refresh()
    assert fault_of(authenticator, issued.secret) is KeyFault.REVOKED


def test_new_key_is_valid_from_the_next_check(authenticator: Authenticator, keyring: Keyring) -> None:
    made = keyring.create(INFER)
    authenticator.refresh()
    assert authenticator.grant(made.secret).principal == made.key.principal


def test_key_expires_without_rereading_the_store(authenticator: Authenticator, issued: IssuedKey, clock: Clock) -> None:
    clock.forward(days=1)
    authenticator._looked_at = clock.monotonic()
    assert fault_of(authenticator, issued.secret) is KeyFault.EXPIRED


def test_old_secret_is_rejected_from_the_next_check_after_a_rotation(
    authenticator: Authenticator, issued: IssuedKey, keyring: Keyring
) -> None:
    rotated = keyring.rotate("ci")
    authenticator.refresh()
    assert fault_of(authenticator, issued.secret) is KeyFault.UNKNOWN
    assert authenticator.grant(rotated.secret).principal == issued.key.principal


def test_old_secret_is_accepted_after_a_rotation_until_its_grace_period_ends(
    authenticator: Authenticator, issued: IssuedKey, keyring: Keyring, clock: Clock
) -> None:
    keyring.rotate("ci", grace=timedelta(seconds=30))
    authenticator.refresh()
    assert authenticator.grant(issued.secret).principal == issued.key.principal
    clock.forward(seconds=30)
    assert fault_of(authenticator, issued.secret) is KeyFault.UNKNOWN


def test_second_rotation_invalidates_the_first_secret(
    authenticator: Authenticator, issued: IssuedKey, keyring: Keyring
) -> None:
    second = keyring.rotate("ci", grace=timedelta(hours=1))
    keyring.rotate("ci", grace=timedelta(hours=1))
    authenticator.refresh()
    assert fault_of(authenticator, issued.secret) is KeyFault.UNKNOWN
    assert authenticator.grant(second.secret).principal == issued.key.principal


def queries(store: Store) -> list[str]:
    """Return a list that collects the queries sent to the store from now on."""
    sent: list[str] = []
    event.listen(store, "before_cursor_execute", lambda *arguments: sent.append(arguments[2]))
    return sent


def test_authentication_never_reads_the_store(authenticator: Authenticator, issued: IssuedKey, store: Store) -> None:
    sent = queries(store)
    authenticator.grant(issued.secret)
    for wrong in ("x", new_secret("nobody00"), new_secret(issued.key.id)):
        fault_of(authenticator, wrong)
    assert sent == []


def test_key_check_reads_only_the_revision_if_no_key_changed(authenticator: Authenticator, store: Store) -> None:
    sent = queries(store)
    authenticator.refresh()
    assert [statement.split("\n")[0] for statement in sent] == ["SELECT max(keys.revision) AS max_1 "]


class Text(str):
    """A string that supports weak references, unlike `str` itself."""


@pytest.mark.parametrize("right", [True, False])
def test_no_key_secret_stays_in_memory(authenticator: Authenticator, issued: IssuedKey, right: bool) -> None:
    came = Text(issued.secret if right else new_secret(issued.key.id))
    kept = weakref.ref(came)
    with nullcontext() if right else pytest.raises(InvalidKeyError):
        authenticator.grant(came)
    del came
    gc.collect()
    assert kept() is None


def test_no_key_is_accepted_before_the_keys_are_first_read_from_the_store(store: Store, issued: IssuedKey) -> None:
    with pytest.raises(KeysUnavailableError):
        Authenticator(store).grant(issued.secret)


def test_known_keys_stay_valid_for_one_minute_after_they_were_last_read_from_the_store(
    authenticator: Authenticator, issued: IssuedKey, clock: Clock
) -> None:
    clock.forward(seconds=60)
    assert authenticator.grant(issued.secret).principal
    clock.forward(seconds=1)
    with pytest.raises(KeysUnavailableError):
        authenticator.grant(issued.secret)
    authenticator.refresh()
    assert authenticator.grant(issued.secret).principal


def test_key_removed_by_restoring_a_backup_is_rejected_as_unknown(
    authenticator: Authenticator, issued: IssuedKey, store: Store
) -> None:
    with store.begin() as connection:
        connection.exec_driver_sql("DELETE FROM keys")
    authenticator.refresh()
    assert authenticator.empty
    assert fault_of(authenticator, issued.secret) is KeyFault.UNKNOWN


@pytest.mark.slow
async def test_key_revocation_takes_effect_within_one_second(store: Store) -> None:
    keyring, authenticator = Keyring(store, ALICE), Authenticator(store)
    issued = keyring.create(INFER)
    following = asyncio.create_task(authenticator.follow(Changes()))
    try:
        async with asyncio.timeout(5):
            while authenticator.empty:
                await asyncio.sleep(0.01)
        assert authenticator.grant(issued.secret).principal
        await asyncio.to_thread(keyring.revoke, issued.key.id)
        await asyncio.sleep(LOOK_S + 0.4)
        assert fault_of(authenticator, issued.secret) is KeyFault.REVOKED
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_key_changes_are_noticed_even_if_the_default_executor_is_blocked(
    authenticator: Authenticator, keyring: Keyring, issued: IssuedKey, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authenticator_module, "LOOK_S", 0.01)
    with blocked_default_executor():
        following = asyncio.create_task(authenticator.follow(Changes()))
        try:
            clock.forward(seconds=61)
            async with asyncio.timeout(30):
                while authenticator._looked_at != clock.monotonic():
                    await asyncio.sleep(0.01)
                grant = authenticator.grant(issued.secret)
                keyring.revoke(issued.key.id)
                while not grant.ended.ended:
                    await asyncio.sleep(0.01)
            assert fault_of(authenticator, issued.secret) is KeyFault.REVOKED
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("keys")]
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("notified", [False, True])
async def test_key_checks_continue_after_a_store_failure(
    authenticator: Authenticator,
    keyring: Keyring,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    notified: bool,
) -> None:
    monkeypatch.setattr(authenticator_module, "LOOK_S", 0.01)
    failures = [OperationalError("SELECT", {}, OSError("disk I/O error"))] * 2

    def failing(store: Store) -> int:
        if failures:
            raise failures.pop()
        return keys_revision(store)

    monkeypatch.setattr(authenticator_module, "keys_revision", failing)
    made, changes = keyring.create(INFER), Changes()
    if notified:
        changes.trust(60)
    following = asyncio.create_task(authenticator.follow(changes))
    with caplog.at_level(logging.ERROR):
        async with asyncio.timeout(FALLBACK_POLL_S - 1):
            while True:
                with suppress(InvalidKeyError):
                    assert authenticator.grant(made.secret).principal
                    break
                await asyncio.sleep(0.01)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert caplog.text.count("could not read the API keys") == 2


def test_no_log_contains_a_key_secret_or_hash(
    authenticator: Authenticator, issued: IssuedKey, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        authenticator.refresh()
        authenticator.grant(issued.secret)
        fault_of(authenticator, new_secret(issued.key.id))
    assert issued.secret not in caplog.text
    assert issued.key.hash not in caplog.text


def test_grant_ends_when_its_key_is_revoked(authenticator: Authenticator, issued: IssuedKey, keyring: Keyring) -> None:
    grant = authenticator.grant(issued.secret)
    authenticator.end_wrong()
    assert not grant.ended.ended
    keyring.revoke("ci")
    authenticator.refresh()
    authenticator.end_wrong()
    assert isinstance(grant.ended.error, InvalidKeyError)
    assert grant.ended.error.fault is KeyFault.REVOKED


def test_grant_ends_when_its_secret_is_rotated_out(
    authenticator: Authenticator, issued: IssuedKey, keyring: Keyring
) -> None:
    grant = authenticator.grant(issued.secret)
    keyring.rotate("ci")
    authenticator.refresh()
    authenticator.end_wrong()
    assert isinstance(grant.ended.error, InvalidKeyError)


def test_authenticating_twice_with_one_secret_returns_the_same_grant_even_if_other_keys_change(
    authenticator: Authenticator, issued: IssuedKey, keyring: Keyring
) -> None:
    grant = authenticator.grant(issued.secret)
    assert authenticator.grant(issued.secret) is grant
    keyring.create(INFER, name="another")
    authenticator.refresh()
    assert authenticator.grant(issued.secret) is grant


def test_previously_accepted_secret_is_rejected_after_its_key_expires(
    authenticator: Authenticator, issued: IssuedKey, clock: Clock
) -> None:
    authenticator.grant(issued.secret)
    clock.forward(days=1)
    authenticator._looked_at = clock.monotonic()
    assert fault_of(authenticator, issued.secret) is KeyFault.EXPIRED


def test_secret_that_was_accepted_during_its_grace_period_is_rejected_afterwards(
    authenticator: Authenticator, issued: IssuedKey, keyring: Keyring, clock: Clock
) -> None:
    keyring.rotate("ci", grace=timedelta(seconds=30))
    authenticator.refresh()
    authenticator.grant(issued.secret)
    clock.forward(seconds=30)
    assert fault_of(authenticator, issued.secret) is KeyFault.UNKNOWN


def test_previously_accepted_secret_is_rejected_if_keys_have_not_been_checked_for_a_minute(
    authenticator: Authenticator, issued: IssuedKey, clock: Clock
) -> None:
    authenticator.grant(issued.secret)
    clock.forward(seconds=61)
    with pytest.raises(KeysUnavailableError):
        authenticator.grant(issued.secret)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("UPDATE keys SET revoked_at = created_at, revision = revision + 1", KeyFault.REVOKED),
        ("UPDATE keys SET hash = 'another', revision = revision + 1", KeyFault.UNKNOWN),
        ("DELETE FROM keys", KeyFault.UNKNOWN),
    ],
)
def test_previously_accepted_secret_is_checked_against_the_newest_keys(
    authenticator: Authenticator, issued: IssuedKey, store: Store, change: str, fault: KeyFault
) -> None:
    authenticator.grant(issued.secret)
    change_keys(store, change)
    authenticator.refresh()
    assert fault_of(authenticator, issued.secret) is fault


@pytest.mark.parametrize("followed", [False, True])
def test_grant_has_the_current_permissions_of_its_key(
    authenticator: Authenticator, issued: IssuedKey, store: Store, followed: bool
) -> None:
    authenticator.grant(issued.secret)
    change_keys(store, "UPDATE keys SET concurrent = 7, revision = revision + 1")
    authenticator.refresh()
    if followed:
        authenticator.end_wrong()
    assert authenticator.grant(issued.secret).principal.limits.concurrent == 7


def test_new_grant_is_issued_when_a_revoked_key_becomes_valid_again(
    authenticator: Authenticator, issued: IssuedKey, store: Store
) -> None:
    ended = authenticator.grant(issued.secret)
    for revoked_at in ("created_at", "NULL"):
        change_keys(store, f"UPDATE keys SET revoked_at = {revoked_at}, revision = revision + 1")
        authenticator.refresh()
        authenticator.end_wrong()
    assert ended.ended.ended
    assert not authenticator.grant(issued.secret).ended.ended


def change_keys(store: Store, statement: str) -> None:
    with store.begin() as connection:
        connection.exec_driver_sql(statement)


def test_grant_ends_when_its_key_expires(authenticator: Authenticator, issued: IssuedKey, clock: Clock) -> None:
    grant = authenticator.grant(issued.secret)
    clock.forward(days=1)
    authenticator.end_wrong()
    assert isinstance(grant.ended.error, InvalidKeyError)
    assert grant.ended.error.fault is KeyFault.EXPIRED


@pytest.mark.slow
async def test_key_expiry_ends_a_grant_while_the_authenticator_is_waiting_for_key_changes(
    store: Store, keyring: Keyring
) -> None:
    issued = keyring.create(INFER, expires_at=datetime.now(UTC) + timedelta(seconds=0.5))
    authenticator, changes = Authenticator(store), Changes()
    changes.trust(60)
    following = asyncio.create_task(authenticator.follow(changes))
    try:
        async with asyncio.timeout(FALLBACK_POLL_S - 2):
            while authenticator.empty:
                await asyncio.sleep(0.01)
            grant = authenticator.grant(issued.secret)
            while not grant.ended.ended:
                await asyncio.sleep(0.01)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


def test_grant_repr_does_not_contain_the_hash(authenticator: Authenticator, issued: IssuedKey) -> None:
    grant = authenticator.grant(issued.secret)
    assert issued.key.hash not in repr(grant)
