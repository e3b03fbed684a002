"""Turns a secret into a principal, from memory. What changes in the store is heard by a look at it twice a second.

What a secret gave is remembered by its hash, since the same few come again and again, and is checked anew when the keys
change; no secret stays in memory. A wrong one ends at its checksum, at its id, which is no secret, or at its hash,
which is compared in constant time; nothing asks the store.

What it does not know: how often somebody has tried.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from svc.end_signal import EndSignal
from svc.errors import AuthenticationError, SvcError
from svc.key_secret import hash_secret, is_hash_of, key_id_of
from svc.principal import Principal
from svc.store.keys import Key, keys_revision, read_keys

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""From one look at the store to the next: a revocation is heard within a second."""
_LONGEST = 64
"""Characters; a secret has fewer."""
_STALE_S = 60.0
"""Without a look for so long, no key is right: one that was revoked meanwhile must not be."""


class KeyFault(StrEnum):
    """What is wrong with a key."""

    MISSING = "missing"
    MALFORMED = "malformed"
    """No secret, or one with a typo."""
    UNKNOWN = "unknown"
    """A secret that was never given out, or was rotated away."""
    REVOKED = "revoked"
    EXPIRED = "expired"


class InvalidKeyError(AuthenticationError):
    """A key that is not right.

    Args:
        fault: what is wrong with it, for counters.
    """

    def __init__(self, fault: KeyFault, wrong: str, *, expected: str = "", todo: str = "") -> None:
        super().__init__(wrong, expected=expected, todo=todo)
        self.fault = fault


class KeysUnavailableError(SvcError):
    """The store has not answered for so long that no key can be called right."""

    retry_after_s = 2


class Grant:
    """What a right secret gave: somebody, until it ends. All that comes with one secret has the same.

    Attributes:
        principal: changes with the key.
        ended: ends, with an InvalidKeyError, when the secret is right no more.
    """

    __slots__ = ("ended", "principal")

    def __init__(self, principal: Principal) -> None:
        self.principal = principal
        self.ended = EndSignal()

    def __repr__(self) -> str:
        return f"Grant({self.principal!r})"


class _Known(NamedTuple):
    """What a secret gave before.

    Attributes:
        keys: those that it was checked against.
        until: when it has to be checked anew, though they are the same; None: never.
    """

    grant: Grant
    keys: Mapping[str, Key]
    until: datetime | None


class Authenticator:
    """Knows all keys of a store. `look` comes before the first `grant`, and may be called in any thread.

    Args:
        now: the time, for what expires.
        clock: monotonic time, seconds, for how old its knowledge is.
    """

    def __init__(
        self,
        store: Store,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._now = now
        self._clock = clock
        self._keys: Mapping[str, Key] = {}  # replaced as a whole, so that readers need no lock
        self._known: dict[str, _Known] = {}  # by the secret's hash: right ones alone, which only the operator makes
        self._revision: int | None = None
        self._looked_at: float | None = None

    @property
    def empty(self) -> bool:
        """There never was a key: the first one is made on the machine itself."""
        return not self._keys

    def look(self) -> None:
        """Reads what has changed in the store; blocks, so not for an event loop.

        Raises:
            SQLAlchemyError: it does not answer; what was known stays known for a minute.
        """
        began = self._clock()
        revision = keys_revision(self._store)
        if revision != self._revision:  # it is smaller where a backup was restored
            self._keys = {key.id: key for key in read_keys(self._store)}
            self._revision = revision
        self._looked_at = began

    async def follow(self) -> None:
        """Read the keys again and again until cancelled, and end the grants that are no longer right.

        The thread is its own: where slow work took all threads that are shared, every key would be stale after a
        minute.
        """
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(max_workers=1, thread_name_prefix="keys")
        try:
            while True:
                try:
                    await loop.run_in_executor(thread, self.look)
                except SQLAlchemyError:
                    log.exception("keys cannot be read; those that were known go on for %.0f s", _STALE_S)
                self.end_wrong()
                await asyncio.sleep(LOOK_S)
        finally:
            thread.shutdown(wait=False)

    def end_wrong(self) -> None:
        """Ends the grants whose key was revoked or has expired, or whose secret was rotated away."""
        keys = self._keys
        for hashed, known in list(self._known.items()):
            if self._holds(known):
                continue
            try:
                key = self._check(keys.get(known.grant.principal.key_id), hashed)
            except InvalidKeyError as error:
                del self._known[hashed]
                known.grant.ended.end(error)
            else:
                self._remember(hashed, key, keys)

    def grant(self, secret: str | None) -> Grant:
        """Who a secret is of; touches neither disk nor network.

        Raises:
            InvalidKeyError: it is of nobody.
            KeysUnavailableError: nobody can say.
        """
        if not secret:
            raise InvalidKeyError(KeyFault.MISSING, "there is no key", expected="Authorization: Bearer KEY")
        if len(secret) > _LONGEST or not secret.isascii():
            raise _malformed()
        hashed = hash_secret(secret)
        known = self._known.get(hashed)
        if known is not None and self._holds(known) and not self._is_stale:
            return known.grant
        return self._granted(secret, hashed)

    def _holds(self, known: _Known) -> bool:
        """Whether there is nothing to check anew."""
        return known.keys is self._keys and (known.until is None or self._now() < known.until)

    @property
    def _is_stale(self) -> bool:
        return self._looked_at is None or self._clock() - self._looked_at > _STALE_S

    def _granted(self, secret: str, hashed: str) -> Grant:
        """What a secret gives that was not checked against these keys yet."""
        key_id = key_id_of(secret)
        if key_id is None:
            raise _malformed()
        if self._is_stale:
            raise KeysUnavailableError("keys cannot be checked now", todo="send the request again later")
        keys = self._keys
        return self._remember(hashed, self._check(keys.get(key_id), hashed), keys)

    def _remember(self, hashed: str, key: Key, keys: Mapping[str, Key]) -> Grant:
        """The grant of a secret that is right by these keys, with what its key may do now."""
        known = self._known.get(hashed)
        grant = known.grant if known else Grant(key.principal)
        grant.principal = key.principal
        self._known[hashed] = _Known(grant, keys, _until(key, hashed))
        return grant

    def _check(self, key: Key | None, hashed: str) -> Key:
        """The key, where a secret of this hash is right.

        Raises:
            InvalidKeyError: it is not.
        """
        now = self._now()
        if key is None or not _is_of(hashed, key, now):
            raise InvalidKeyError(
                KeyFault.UNKNOWN, "this key is not right", todo="use the newest one that you were given"
            )
        if key.revoked_at is not None:
            raise InvalidKeyError(KeyFault.REVOKED, f"the key {key.id} is revoked", todo="ask for another")
        if key.expired(now):
            raise InvalidKeyError(KeyFault.EXPIRED, f"the key {key.id} has expired", todo="ask for another")
        return key


def _malformed() -> InvalidKeyError:
    return InvalidKeyError(
        KeyFault.MALFORMED, "this is no key of this service", expected="all of what `svc keys create` has shown"
    )


def _until(key: Key, hashed: str) -> datetime | None:
    """When a right secret may be right no more."""
    ends = [key.expires_at, None if is_hash_of(key.hash, hashed) else key.previous_until]
    return min((end for end in ends if end is not None), default=None)


def _is_of(hashed: str, key: Key, now: datetime) -> bool:
    if is_hash_of(key.hash, hashed):
        return True
    return (
        key.previous_hash is not None
        and key.previous_until is not None
        and now < key.previous_until
        and is_hash_of(key.previous_hash, hashed)
    )
