"""Delivers webhook messages to one receiver, signed as Standard Webhooks specifies.

The messages are kept in the store, so none is lost in a restart. A message may be delivered twice, with the same
`webhook-id`: the server may stop, or another server may take over, after the receiver has accepted the message and
before the delivery is recorded.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import httpx
from sqlalchemy import Engine as Store

from serving.store_changes.changes import Changes
from svc.errors import SettingsError
from svc.identity.key_file import read_secret
from svc.settings.webhook import WebhookSettings
from svc.store.outage_log import log_store_error
from svc.store.webhooks import (
    WebhookDelivery,
    WebhookOutcome,
    drop_deliveries,
    due_deliveries,
    postpone_delivery,
    remove_delivery,
)

log = logging.getLogger(__name__)

MAX_AGE = timedelta(days=1)
"""Age after which a message is no longer retried."""
MAX_PENDING = 1000
"""Maximum number of pending messages per receiver. When there are more, the oldest messages are dropped."""
MAX_DELAY_S = 7200.0
_FIRST_DELAY_S = 5.0
_GROWTH = 4
_TIMEOUT_S = 15.0
_POLL_S = 1.0
_BATCH = 20
_GONE = 410
_MIN_SECRET_BYTES, _MAX_SECRET_BYTES = 24, 64
_PREFIX = "whsec_"


@dataclass(frozen=True, eq=False, kw_only=True)
class Webhook:
    """Sends one receiver's messages. Failed deliveries are retried for a day with increasing delays.

    Attributes:
        keys: keys that sign each message; during a rotation, both the new and the old key.
        changes: notifications about changes in the store, which this object waits for.
        count: called with an outcome and how often it occurred. Delivery attempts and dropped messages are counted.
        leads: function that returns whether this server sends the messages. If there are several servers, only one of
            them does.
    """

    url: str
    keys: tuple[bytes, ...] = field(repr=False)
    store: Store
    changes: Changes
    count: Callable[[WebhookOutcome, int], None]
    leads: Callable[[], bool] = lambda: True

    @classmethod
    def of(
        cls,
        settings: WebhookSettings,
        store: Store,
        changes: Changes,
        count: Callable[[WebhookOutcome, int], None],
        leads: Callable[[], bool] = lambda: True,
    ) -> Self:
        """Create a sender from a receiver's settings.

        Raises:
            SettingsError: the file with the secrets is unusable.
        """
        keys = read_webhook_keys(settings.secret_file)
        return cls(url=settings.url, keys=keys, store=store, changes=changes, count=count, leads=leads)

    async def run(self) -> None:
        """Deliver messages until cancelled."""
        # Proxies from the environment are used, as they may be the only way out, except for a server on this machine.
        async with httpx.AsyncClient(
            timeout=_TIMEOUT_S, follow_redirects=False, trust_env=self.url.startswith("https:")
        ) as http:
            while True:
                count, sent = self.changes.count, True
                try:
                    sent = self.leads() and await self._send_due(http)
                except Exception:  # noqa: BLE001 - the boundary of this task, which must not stop the server
                    log_store_error(log, "could not send the webhook messages for %s; retrying", self._receiver)
                if sent:
                    await asyncio.sleep(_POLL_S)
                else:
                    await self.changes.wait(count, _POLL_S)

    async def _send_due(self, http: httpx.AsyncClient) -> bool:
        """Send the messages that are due, and return whether there were any."""
        due = await asyncio.to_thread(due_deliveries, self.store, self.url, _BATCH)
        if not due:
            return False
        before = datetime.now(UTC) - MAX_AGE
        dropped = await asyncio.to_thread(drop_deliveries, self.store, self.url, before=before, keep=MAX_PENDING)
        if dropped:
            log.error("%d webhook messages were never delivered to %s", dropped, self._receiver)
            self.count(WebhookOutcome.DROPPED, dropped)
            due = await asyncio.to_thread(due_deliveries, self.store, self.url, _BATCH)
        for delivery in due:
            await self._send(http, delivery)
        return True

    async def _send(self, http: httpx.AsyncClient, delivery: WebhookDelivery) -> None:
        retry_after_s = 0.0
        try:
            async with (
                asyncio.timeout(_TIMEOUT_S),
                http.stream("POST", self.url, content=delivery.body, headers=self._headers(delivery)) as response,
            ):
                status = response.status_code
                retry_after = response.headers.get("retry-after", "")
                retry_after_s = float(retry_after) if retry_after.isdecimal() else 0.0
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:  # TimeoutError is an OSError
            problem = repr(error)
        else:
            if 200 <= status < 300:
                await asyncio.to_thread(remove_delivery, self.store, delivery.id)
                self.count(WebhookOutcome.DELIVERED, 1)
                return
            problem = f"status {status}"
            if status == _GONE:
                log.error("%s no longer accepts webhook messages; dropping %s", self._receiver, delivery.message)
                await asyncio.to_thread(remove_delivery, self.store, delivery.id)
                self.count(WebhookOutcome.DROPPED, 1)
                return
        wait_s = max(delay_s(delivery.attempts), min(retry_after_s, MAX_DELAY_S))
        log.warning(
            "could not deliver webhook message %s to %s: %s; next attempt in %.0f s",
            delivery.message,
            self._receiver,
            problem,
            wait_s,
        )
        due_at = datetime.now(UTC) + timedelta(seconds=wait_s)
        await asyncio.to_thread(postpone_delivery, self.store, delivery.id, due_at)
        self.count(WebhookOutcome.FAILED, 1)

    def _headers(self, delivery: WebhookDelivery) -> dict[str, str]:
        seconds = int(time.time())
        return {
            "content-type": "application/json",
            "user-agent": "tuneserve",
            "webhook-id": delivery.message,
            "webhook-timestamp": str(seconds),
            "webhook-signature": signatures(self.keys, delivery.message, seconds, delivery.body),
        }

    @property
    def _receiver(self) -> str:
        """Return the receiver's address for use in logs. The path is left out, because it may contain a secret."""
        return urlsplit(self.url).netloc


def signatures(keys: tuple[bytes, ...], message: str, seconds: int, body: str) -> str:
    """Return the value of the `webhook-signature` header: one signature per key, separated by spaces.

    Source: Standard Webhooks 1.0.0, "Signature scheme": HMAC-SHA256 of `{id}.{timestamp}.{body}`, in base64.
    """
    signed = f"{message}.{seconds}.{body}".encode()
    digests = (hmac.new(key, signed, hashlib.sha256).digest() for key in keys)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def delay_s(attempts: int) -> float:
    """Return the time until the next attempt, in seconds.

    The delays are 5, 20, 80, ... seconds, up to two hours, each with a random jitter of up to 20%.

    Args:
        attempts: number of failed attempts so far.
    """
    growing_s: float = _FIRST_DELAY_S * _GROWTH ** min(attempts, 20)
    return min(growing_s, MAX_DELAY_S) * random.uniform(0.8, 1.2)  # noqa: S311 - spreads the attempts, no secret


def read_webhook_keys(path: Path) -> tuple[bytes, ...]:
    """Return the signing keys in a file, which contains one secret or, during a rotation, several secrets separated by
    whitespace.

    Raises:
        SettingsError: the file cannot be read, is readable by other users, or contains an invalid secret.
    """
    return tuple(
        _key(path, secret) for secret in read_secret(path, "replace the secret here and at the receiver").split()
    )


def _key(path: Path, secret: str) -> bytes:
    encoded = secret.removeprefix(_PREFIX)
    try:
        key = base64.b64decode(encoded, validate=True) if encoded != secret else b""
    except binascii.Error:
        key = b""
    if not _MIN_SECRET_BYTES <= len(key) <= _MAX_SECRET_BYTES:
        raise SettingsError(
            f"the file {path} contains no valid webhook secret",
            expected=f"`{_PREFIX}` followed by {_MIN_SECRET_BYTES} to {_MAX_SECRET_BYTES} random bytes in base64",
            todo=f'create one: (umask 077; echo "{_PREFIX}$(openssl rand -base64 32)" > {path})',
        )
    return key
