"""Tests that webhook messages are signed, retried and delivered to a real HTTP server, also after a restart."""

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from serving.background import webhook
from serving.background.webhook import MAX_AGE, MAX_DELAY_S, Webhook, delay_s, read_webhook_keys
from serving.store_changes.changes import Changes
from svc.errors import SettingsError
from svc.settings.webhook import WebhookSettings
from svc.store.tables import WebhookDeliveryRow
from svc.store.webhooks import WebhookOutcome, add_deliveries, due_deliveries
from tests.new_store import new_store
from tests.serving.control import until
from tests.serving.home import Home
from tests.serving.versions import NAME

pytestmark = pytest.mark.slow

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OLD_SECRET = "whsec_" + base64.b64encode(bytes(range(32, 64))).decode()
BODY = '{"type":"rollout.canary","data":{"version":"tickets@2"}}'
DELIVERED, FAILED, DROPPED = WebhookOutcome.DELIVERED, WebhookOutcome.FAILED, WebhookOutcome.DROPPED


@dataclass
class Received:
    """A request as it arrived.

    Attributes:
        headers: headers with their names in lower case.
    """

    path: str
    headers: dict[str, str]
    body: bytes

    def verify(self, secret: str) -> None:
        """Verify a message by the rule of the reference library of Standard Webhooks.

        Raises:
            AssertionError: a header is missing, the timestamp is not within five minutes, or no signature matches.
        """
        message, sent_at = self.headers["webhook-id"], self.headers["webhook-timestamp"]
        assert abs(time.time() - int(sent_at)) <= 300
        key = base64.b64decode(secret.removeprefix("whsec_"))
        content = f"{message}.{sent_at}.{self.body.decode()}".encode()
        expected = hmac.new(key, content, hashlib.sha256).digest()
        given = [each.split(",") for each in self.headers["webhook-signature"].split(" ")]
        assert any(
            scheme == "v1" and hmac.compare_digest(base64.b64decode(signature), expected) for scheme, signature in given
        )


@dataclass
class Receiver:
    """A receiver of webhook messages on this machine.

    Attributes:
        statuses: statuses of the next responses; 200 follows.
        headers: additional headers of each response.
        go_on: event before which it is not responding.
    """

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    received: list[Received] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    receiver.go_on.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.go_on.wait(30)
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.received.append(Received(self.path, headers, body))
            self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
            for name, value in receiver.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Suppress the log output of the HTTP server."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        receiver.url = f"http://127.0.0.1:{server.server_port}/hook"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield receiver
        receiver.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _retry_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_POLL_S", 0.02)
    monkeypatch.setattr(webhook, "_FIRST_DELAY_S", 0.05)
    monkeypatch.setattr(webhook, "_GROWTH", 1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "home")


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    return secrets(tmp_path, SECRET)


def secrets(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "secret"
    path.write_text(f"{text}\n")
    path.chmod(mode)
    return path


def add(store: Store, url: str, body: str = BODY, *, age: timedelta = timedelta()) -> None:
    with Session(store) as session, session.begin():
        add_deliveries(session, [url], body)
        session.execute(update(WebhookDeliveryRow).values(created_at=datetime.now(UTC) - age))


@asynccontextmanager
async def sending(
    store: Store, url: str, secret_file: Path, leads: Callable[[], bool] = lambda: True
) -> AsyncIterator[Counter[WebhookOutcome]]:
    """Run a sender while the context is active, and yield the counted outcomes."""
    counted: Counter[WebhookOutcome] = Counter()

    def count(outcome: WebhookOutcome, number: int) -> None:
        counted[outcome] += number

    settings = WebhookSettings(url=url, secret_file=secret_file)
    task = asyncio.create_task(Webhook.of(settings, store, Changes(), count, leads).run())
    try:
        yield counted
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_server_sends_no_webhook_messages_until_it_becomes_the_leader(
    store: Store, receiver: Receiver, secret_file: Path
) -> None:
    leads = False
    add(store, receiver.url)
    async with sending(store, receiver.url, secret_file, lambda: leads) as counted:
        await asyncio.sleep(0.1)
        assert receiver.received == []
        leads = True
        await until(lambda: counted[DELIVERED] == 1)


async def test_receiver_can_verify_the_signature_of_a_webhook_message(
    store: Store, receiver: Receiver, secret_file: Path
) -> None:
    add(store, receiver.url)
    async with sending(store, receiver.url, secret_file) as counted:
        await until(lambda: counted[DELIVERED] == 1)
    (received,) = receiver.received
    received.verify(SECRET)
    assert (received.path, received.body.decode()) == ("/hook", BODY)
    assert received.headers["content-type"] == "application/json"
    with pytest.raises(AssertionError):
        received.verify(OLD_SECRET)
    received.body += b" "
    with pytest.raises(AssertionError):
        received.verify(SECRET)
    assert due_deliveries(store, receiver.url, 9) == []


async def test_webhook_signature_is_valid_under_both_old_and_new_secret_during_rotation(
    store: Store, receiver: Receiver, tmp_path: Path
) -> None:
    add(store, receiver.url)
    async with sending(store, receiver.url, secrets(tmp_path, f"{SECRET}\n{OLD_SECRET}")) as counted:
        await until(lambda: counted[DELIVERED] == 1)
    receiver.received[0].verify(SECRET)
    receiver.received[0].verify(OLD_SECRET)


async def test_webhook_message_is_retried_with_the_same_id_until_the_receiver_accepts_it(
    store: Store, receiver: Receiver, secret_file: Path
) -> None:
    receiver.statuses = [500, 429, 302]
    receiver.headers = {"location": "/elsewhere"}
    add(store, receiver.url)
    async with sending(store, receiver.url, secret_file) as counted:
        await until(lambda: counted[DELIVERED] == 1)
    assert counted == {FAILED: 3, DELIVERED: 1}
    assert {received.path for received in receiver.received} == {"/hook"}  # the redirect was not followed
    assert len({received.headers["webhook-id"] for received in receiver.received}) == 1
    for received in receiver.received:
        received.verify(SECRET)


async def test_webhook_retry_respects_the_retry_after_header_of_the_receiver(
    store: Store, receiver: Receiver, secret_file: Path
) -> None:
    receiver.statuses = [503]
    receiver.headers = {"retry-after": "3600"}
    add(store, receiver.url)
    async with sending(store, receiver.url, secret_file) as counted:
        await until(lambda: counted[FAILED] == 1)
        await asyncio.sleep(0.2)
    assert len(receiver.received) == 1


async def test_webhook_retry_waits_at_most_two_hours_despite_a_longer_retry_after(
    store: Store, receiver: Receiver, secret_file: Path
) -> None:
    receiver.statuses = [503]
    receiver.headers = {"retry-after": str(365 * 86_400)}
    add(store, receiver.url)
    async with sending(store, receiver.url, secret_file) as counted:
        await until(lambda: counted[FAILED] == 1)
    with Session(store) as session:
        due_at = session.scalars(select(WebhookDeliveryRow.due_at)).one()
    assert due_at <= datetime.now(UTC) + timedelta(seconds=MAX_DELAY_S)


async def test_webhook_message_is_delivered_after_a_restart_if_the_receiver_was_unreachable(
    store: Store, receiver: Receiver, secret_file: Path
) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        unreachable = f"http://127.0.0.1:{reserved.getsockname()[1]}/hook"
        add(store, unreachable)
        async with sending(store, unreachable, secret_file) as counted:
            await until(lambda: counted[FAILED] >= 2)
    with Session(store) as session, session.begin():
        session.execute(update(WebhookDeliveryRow).values(url=receiver.url))
    async with sending(store, receiver.url, secret_file) as counted:
        await until(lambda: counted[DELIVERED] == 1)
    assert [received.body.decode() for received in receiver.received] == [BODY]


async def test_webhook_request_times_out_if_the_receiver_does_not_respond(
    store: Store, receiver: Receiver, secret_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "_TIMEOUT_S", 0.1)
    receiver.go_on.clear()
    add(store, receiver.url)
    async with sending(store, receiver.url, secret_file) as counted:
        await until(lambda: counted[FAILED] >= 1)
        receiver.go_on.set()
        monkeypatch.setattr(webhook, "_TIMEOUT_S", 10)
        await until(lambda: counted[DELIVERED] == 1)


async def test_webhook_message_older_than_a_day_is_dropped_and_counted(
    store: Store, receiver: Receiver, secret_file: Path
) -> None:
    add(store, receiver.url, age=MAX_AGE + timedelta(seconds=1))
    async with sending(store, receiver.url, secret_file) as counted:
        await until(lambda: counted[DROPPED] == 1)
    assert receiver.received == []


async def test_oldest_webhook_messages_are_dropped_when_too_many_are_queued(
    store: Store, receiver: Receiver, secret_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "MAX_PENDING", 3)
    for number in range(5):
        add(store, receiver.url, str(number))
    async with sending(store, receiver.url, secret_file) as counted:
        await until(lambda: counted[DELIVERED] == 3)
    assert [received.body for received in receiver.received] == [b"2", b"3", b"4"]
    assert counted[DROPPED] == 2


async def test_webhook_message_is_dropped_when_the_receiver_responds_with_410_gone(
    store: Store, receiver: Receiver, secret_file: Path
) -> None:
    receiver.statuses = [410]
    add(store, receiver.url)
    async with sending(store, receiver.url, secret_file) as counted:
        await until(lambda: counted[DROPPED] == 1)
    assert due_deliveries(store, receiver.url, 9) == []


async def test_webhook_messages_stored_before_the_server_started_are_sent_and_counted(
    tmp_path: Path, receiver: Receiver, secret_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "home", monkeypatch)
    configured = WebhookSettings(url=receiver.url, secret_file=secret_file)
    home.settings = home.settings.model_copy(update={"webhooks": (configured,)})
    add(home.store, receiver.url)
    async with home.serving(f"{NAME}@1") as client:
        await until(lambda: bool(receiver.received) and not due_deliveries(home.store, receiver.url, 9))
        page = (await client.get("/metrics")).text
    assert 'svc_webhook_deliveries_total{outcome="delivered"} 1.0' in page
    assert json.loads(receiver.received[0].body)["type"] == "rollout.canary"


@pytest.mark.parametrize(
    ("text", "mode", "wrong"),
    [
        (SECRET, 0o644, "can be read by other users"),
        ("", 0o600, "is empty"),
        (SECRET.removeprefix("whsec_"), 0o600, "contains no valid webhook secret"),
        ("whsec_not base64", 0o600, "contains no valid webhook secret"),
        ("whsec_" + base64.b64encode(bytes(23)).decode(), 0o600, "contains no valid webhook secret"),
        (f"{SECRET} other", 0o600, "contains no valid webhook secret"),
    ],
    ids=["readable by others", "empty", "no prefix", "no base64", "short", "second invalid"],
)
def test_invalid_webhook_secret_file_is_rejected_without_quoting_its_content(
    tmp_path: Path, text: str, mode: int, wrong: str
) -> None:
    with pytest.raises(SettingsError, match=wrong) as raised:
        read_webhook_keys(secrets(tmp_path, text, mode))
    assert SECRET.removeprefix("whsec_") not in str(raised.value)


def test_webhook_retry_delay_grows_to_two_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    delays = [delay_s(attempts) for attempts in range(1000)]
    assert 4 <= delays[0] <= 6
    assert all(0.8 * MAX_DELAY_S <= delay <= 1.2 * MAX_DELAY_S for delay in delays[6:])
    assert delays[:6] == sorted(delays[:6])
