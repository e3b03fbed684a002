"""Authenticate secrets against keys held in memory, which are reloaded when they change in the store.

For each valid secret, a `Grant` is cached under the secret's hash. All requests with that secret share the grant, and
no secret stays in memory. An invalid secret is detected without querying the store: by its checksum, by the key id that
it contains (which is public), or by its hash (which is compared in constant time).

Failed attempts are not counted here.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.one_shot_event import OneShotEvent
from serving.protocols.error_code import ErrorCode, answered_with
from serving.store_changes.changes import Changes
from svc.errors import AuthenticationError, SvcError
from svc.identity.key_secret import hash_secret, is_hash_of, key_id_of
from svc.identity.principal import Principal
from svc.store.keys import Key, keys_revision, read_keys
from svc.store.outage_log import log_store_error

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""Seconds between polls of the store if it sends no notifications. A revocation then takes effect within a second."""
_STALE_S = 60.0
"""Maximum age of the keys in memory, in seconds. When the keys are older, all are rejected, because any of them may
have been revoked since."""


class KeyFault(StrEnum):
    """Reason why a key was rejected."""

    MISSING = "missing"
    MALFORMED = "malformed"
    """The given string does not have the form of a secret, or its checksum is wrong."""
    UNKNOWN = "unknown"
    """The secret is well-formed, but was never issued or has been replaced by a rotation."""
    REVOKED = "revoked"
    EXPIRED = "expired"


class InvalidKeyError(AuthenticationError):
    """Raised when a request's key is missing, invalid, expired or revoked.

    Args:
        fault: reason for the rejection, for metrics.
    """

    def __init__(self, fault: KeyFault, wrong: str, *, expected: str = "", todo: str = "") -> None:
        super().__init__(wrong, expected=expected, todo=todo)
        self.fault = fault


@answered_with(503, ErrorCode.KEYS_UNAVAILABLE)
class KeysUnavailableError(SvcError):
    """Raised when the keys in memory are too old to be trusted, because the store has been unreachable."""

    retry_after_s = 2


@dataclass(slots=True, eq=False)
class Grant:
    """The principal of a valid secret, for as long as the secret is valid. Requests with the same secret share a grant.

    Attributes:
        principal: principal as of the latest request.
        ended: event set with an InvalidKeyError once the secret is no longer valid.
    """

    principal: Principal
    ended: OneShotEvent = field(default_factory=OneShotEvent, repr=False)


class Authenticator:
    """Checks secrets against a store's keys, which are held in memory.

    `refresh` must be called, in any thread, before the first call to `grant`.

    Args:
        now: function that returns the current time, used to check expiry.
        clock: function that returns monotonic time in seconds, used to measure the age of the keys in memory.
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
        self._grants: dict[str, Grant] = {}  # by the hash of valid secrets only, which only the operator creates
        self._revision: int | None = None
        self._looked_at: float | None = None

    @property
    def empty(self) -> bool:
        """Whether no keys have ever been created."""
        return not self._keys

    def refresh(self) -> None:
        """Reload the keys if any have changed in the store. This blocks, so do not call it on an event loop.

        Raises:
            SQLAlchemyError: the store is not responding. The keys in memory remain usable for a minute.
        """
        began = self._clock()
        revision = keys_revision(self._store)
        if revision != self._revision:  # smaller if a backup was restored
            self._keys = {key.id: key for key in read_keys(self._store)}
            self._revision = revision
        self._looked_at = began

    async def follow(self, changes: Changes) -> None:
        """Until cancelled, reload the keys whenever they change, and end grants whose secrets have become invalid.

        The store is read in a dedicated thread, because slow work may occupy all shared threads. The keys in memory
        would then become too old, and all keys would be rejected after a minute.
        """
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(max_workers=1, thread_name_prefix="keys")
        try:
            while True:
                count, again_s = changes.count, math.inf
                try:
                    await loop.run_in_executor(thread, self.refresh)
                except SQLAlchemyError:
                    again_s = LOOK_S  # a change that was announced before is not announced again
                    log_store_error(
                        log,
                        "could not read the API keys; cached keys stay in use until %.0f s after the last successful "
                        "read",
                        _STALE_S,
                    )
                self.end_wrong()
                await changes.wait(count, LOOK_S, within_s=min(again_s, self._valid_s()))
        finally:
            thread.shutdown(wait=False)

    def end_wrong(self) -> None:
        """End all grants whose key has been revoked or has expired, or whose secret is invalid after a rotation."""
        for hashed, grant in list(self._grants.items()):
            try:
                self._check(grant.principal.key_id, hashed)
            except InvalidKeyError as error:
                del self._grants[hashed]
                grant.ended.end(error)

    def _valid_s(self) -> float:
        """Return the time until the next secret expires, in seconds.

        Secrets that have no grant yet are included, because a grant for them may be created during the wait.
        """
        now, keys = self._now(), self._keys.values()
        ends = [end for key in keys for end in (key.expires_at, key.previous_until) if end is not None and end > now]
        return (min(ends) - now).total_seconds() if ends else math.inf

    def grant(self, secret: str | None) -> Grant:
        """Return the grant for a secret. This uses neither the disk nor the network.

        Raises:
            InvalidKeyError: no key has this secret, or its key is not valid.
            KeysUnavailableError: the keys in memory are too old to be trusted.
        """
        if not secret:
            raise InvalidKeyError(KeyFault.MISSING, "missing API key", expected="Authorization: Bearer KEY")
        hashed = hash_secret(secret)
        grant = self._grants.get(hashed)
        key_id = grant.principal.key_id if grant else key_id_of(secret)
        if key_id is None:
            raise InvalidKeyError(
                KeyFault.MALFORMED, "malformed API key", expected="the complete secret that `svc keys create` printed"
            )
        self._require_fresh()
        principal = self._check(key_id, hashed)
        if grant is None:
            grant = self._grants[hashed] = Grant(principal)
        grant.principal = principal  # the operator may have changed what the key may do
        return grant

    def principal(self, key_id: str) -> Principal | None:
        """Return the principal of a key, even if the key is no longer valid, or None if there is no such key."""
        key = self._keys.get(key_id)
        return key.principal if key else None

    def valid_principal(self, key_id: str) -> Principal:
        """Return the principal of a key, for work that continues after the request that presented the secret has ended.

        Raises:
            InvalidKeyError: the key was removed, or is revoked or expired.
            KeysUnavailableError: the keys in memory are too old to be trusted.
        """
        self._require_fresh()
        key = self._keys.get(key_id)
        if key is None:
            raise InvalidKeyError(KeyFault.UNKNOWN, f"there is no key {key_id}")
        self._require_valid(key, self._now())
        return key.principal

    def _require_fresh(self) -> None:
        if self._looked_at is None or self._clock() - self._looked_at > _STALE_S:
            raise KeysUnavailableError("API keys cannot currently be checked", todo="retry the request later")

    def _check(self, key_id: str, hashed: str) -> Principal:
        """Return a key's principal, provided that a secret with this hash is valid for the key.

        Raises:
            InvalidKeyError: the secret does not belong to the key, or the key is revoked or expired.
        """
        key, now = self._keys.get(key_id), self._now()
        if key is None or not _is_of(hashed, key, now):
            raise InvalidKeyError(
                KeyFault.UNKNOWN, "invalid API key", todo="use the newest secret that was issued for this key"
            )
        self._require_valid(key, now)
        return key.principal

    def _require_valid(self, key: Key, now: datetime) -> None:
        if key.revoked_at is not None:
            raise InvalidKeyError(KeyFault.REVOKED, f"key {key.id} has been revoked", todo="ask for a new key")
        if key.expired(now):
            raise InvalidKeyError(KeyFault.EXPIRED, f"key {key.id} has expired", todo="ask for a new key")


def _is_of(hashed: str, key: Key, now: datetime) -> bool:
    """Return whether a hash matches the key's current secret, or its previous secret during the grace period."""
    if is_hash_of(key.hash, hashed):
        return True
    if key.previous_hash is None or key.previous_until is None or now >= key.previous_until:
        return False
    return is_hash_of(key.previous_hash, hashed)
