"""Turns a secret into a principal, from memory. What changes in the store is heard by a look at it four times a second.

A wrong key costs no more than a right one: what is no secret, or has a typo, ends at its checksum, and an id that there
is not at a look into a dictionary; neither is hashed, and nothing asks the store. An id is no secret, so it may take
its own time; hashes are compared in constant time. A SHA-256 takes a microsecond: what is cached is the rows, and no
secret stays in memory.

What it does not know: how often somebody has tried.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

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


class Grant(NamedTuple):
    """What a right secret gave: somebody, until `Authenticator.check` says otherwise. A tuple, made for each request.

    Attributes:
        hash: of the secret, which is not kept.
    """

    principal: Principal
    hash: str

    def __repr__(self) -> str:
        return f"Grant({self.principal!r})"


class Authenticator:
    """Knows all keys of a store. `look` comes before the first `authenticate`; any thread may call either.

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
        self._keys: dict[str, Key] = {}  # replaced as a whole, so that readers need no lock
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

    async def follow(self, on_look: Callable[[], None] = lambda: None) -> None:
        """Looks again and again, in a thread, until it is cancelled.

        Args:
            on_look: called after each look, in the event loop: a key may be right no more.
        """
        while True:
            try:
                await asyncio.to_thread(self.look)
            except SQLAlchemyError:
                log.exception("keys cannot be read; those that were known go on for %.0f s", _STALE_S)
            on_look()
            await asyncio.sleep(LOOK_S)

    def authenticate(self, secret: str | None) -> Principal:
        """Who a secret is of; see `grant`."""
        return self.grant(secret).principal

    def grant(self, secret: str | None) -> Grant:
        """Who a secret is of; touches neither disk nor network.

        Raises:
            InvalidKeyError: it is of nobody.
            KeysUnavailableError: nobody can say.
        """
        if not secret:
            raise InvalidKeyError(KeyFault.MISSING, "there is no key", expected="Authorization: Bearer KEY")
        key_id = _id_of(secret) if len(secret) <= _LONGEST else None
        if key_id is None:
            raise InvalidKeyError(
                KeyFault.MALFORMED, "this is no key of this service", expected="all of what `svc keys create` has shown"
            )
        if self._looked_at is None or self._clock() - self._looked_at > _STALE_S:
            raise KeysUnavailableError("keys cannot be checked now", todo="send the request again later")
        key = self._keys.get(key_id)
        if key is None:
            raise _unknown()
        found = _hash_of(secret)
        self._check(key, found)
        return Grant(key.principal, found)

    def check(self, grant: Grant) -> None:
        """Whether a grant is still right, as far as is known: for what has begun with it, and goes on.

        Raises:
            InvalidKeyError: its key was revoked or has expired, or the secret was rotated away.
        """
        key = self._keys.get(grant.principal.key_id)
        if key is None:
            raise _unknown()
        self._check(key, grant.hash)

    def _check(self, key: Key, hash: str) -> None:
        now = self._now()
        if not _is_of(hash, key, now):
            raise _unknown()
        if key.revoked_at is not None:
            raise InvalidKeyError(KeyFault.REVOKED, f"the key {key.id} is revoked", todo="ask for another")
        if key.expired(now):
            raise InvalidKeyError(KeyFault.EXPIRED, f"the key {key.id} has expired", todo="ask for another")


# The same few secrets come again and again.
_id_of, _hash_of = lru_cache(maxsize=1024)(key_id_of), lru_cache(maxsize=1024)(hash_secret)


def _unknown() -> InvalidKeyError:
    return InvalidKeyError(KeyFault.UNKNOWN, "this key is not right", todo="use the newest one that you were given")


def _is_of(found: str, key: Key, now: datetime) -> bool:
    if is_hash_of(key.hash, found):
        return True
    return (
        key.previous_hash is not None
        and key.previous_until is not None
        and now < key.previous_until
        and is_hash_of(key.previous_hash, found)
    )
