"""Turns a secret into a principal, from memory. What changes in the store is heard by a look at it twice a second.

Every secret is checked against the keys in memory. The grant of a right secret is remembered by the secret's hash, so
that all its requests share one; no secret stays in memory. A wrong secret is rejected by its checksum, by its id, which
is no secret, or by its hash, which is compared in constant time; nothing asks the store.

What it does not know: how often somebody has tried.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from svc.errors import AuthenticationError, SvcError
from svc.identity.key_secret import hash_secret, is_hash_of, key_id_of
from svc.identity.principal import Principal
from svc.one_shot_event import OneShotEvent
from svc.store.keys import Key, keys_revision, read_keys

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""From one look at the store to the next: a revocation is heard within a second."""
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


@dataclass(slots=True, eq=False)
class Grant:
    """What a right secret gave: somebody, until it ends. All requests with one secret share it.

    Attributes:
        principal: as of the newest request.
        ended: ends, with an InvalidKeyError, when the secret is no longer right.
    """

    principal: Principal
    ended: OneShotEvent = field(default_factory=OneShotEvent, repr=False)


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
        self._grants: dict[str, Grant] = {}  # by the secret's hash: right ones alone, which only the operator makes
        self._revision: int | None = None
        self._looked_at: float | None = None

    @property
    def empty(self) -> bool:
        """There never was a key: the first one is made on the machine itself."""
        return not self._keys

    def look(self) -> None:
        """Read what has changed in the store. This blocks, so it is not for an event loop.

        Raises:
            SQLAlchemyError: the store does not answer; the keys that were read before are used for a minute.
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
        """End the grants whose key was revoked or has expired, or whose secret was rotated away."""
        for hashed, grant in list(self._grants.items()):
            try:
                self._check(grant.principal.key_id, hashed)
            except InvalidKeyError as error:
                del self._grants[hashed]
                grant.ended.end(error)

    def grant(self, secret: str | None) -> Grant:
        """Return the grant of a secret; touches neither disk nor network.

        Raises:
            InvalidKeyError: no key has this secret, or its key is not valid.
            KeysUnavailableError: the keys were not read for too long.
        """
        if not secret:
            raise InvalidKeyError(KeyFault.MISSING, "there is no key", expected="Authorization: Bearer KEY")
        hashed = hash_secret(secret)
        grant = self._grants.get(hashed)
        key_id = grant.principal.key_id if grant else key_id_of(secret)
        if key_id is None:
            raise InvalidKeyError(
                KeyFault.MALFORMED, "the key is malformed", expected="the whole secret that `svc keys create` printed"
            )
        if self._looked_at is None or self._clock() - self._looked_at > _STALE_S:
            raise KeysUnavailableError("keys cannot be checked now", todo="send the request again later")
        principal = self._check(key_id, hashed)
        if grant is None:
            grant = self._grants[hashed] = Grant(principal)
        grant.principal = principal  # the operator may have changed what the key may do
        return grant

    def _check(self, key_id: str, hashed: str) -> Principal:
        """Return the principal of a key, if a secret of this hash is valid for it.

        Raises:
            InvalidKeyError: the secret is not the key's, or the key is revoked or expired.
        """
        key, now = self._keys.get(key_id), self._now()
        if key is None or not _is_of(hashed, key, now):
            raise InvalidKeyError(
                KeyFault.UNKNOWN, "this key is not right", todo="use the newest one that you were given"
            )
        if key.revoked_at is not None:
            raise InvalidKeyError(KeyFault.REVOKED, f"the key {key.id} is revoked", todo="ask for another")
        if key.expired(now):
            raise InvalidKeyError(KeyFault.EXPIRED, f"the key {key.id} has expired", todo="ask for another")
        return key.principal


def _is_of(hashed: str, key: Key, now: datetime) -> bool:
    """Whether a hash is that of a key's secret, or of the one before it within the grace of the last rotation."""
    if is_hash_of(key.hash, hashed):
        return True
    if key.previous_hash is None or key.previous_until is None or now >= key.previous_until:
        return False
    return is_hash_of(key.previous_hash, hashed)
