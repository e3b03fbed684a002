"""Tests that the gateway serves while its PostgreSQL database is away, and stores the requests afterwards."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from svc.store.tables import RequestRow
from tests.postgresql import PostgresServer
from tests.serving.service import CHAT, Service


@pytest.fixture
def store(postgresql: PostgresServer) -> Store:
    return postgresql.empty()


@pytest.fixture
async def service(socket_folder: Path, store: Store) -> AsyncIterator[Service]:
    async with Service(socket_folder, store=store).run() as service:
        yield service


def stored(store: Store) -> int:
    with Session(store) as session:
        return session.scalar(select(func.count()).select_from(RequestRow)) or 0


@pytest.mark.slow
async def test_requests_are_answered_during_a_database_outage_and_logged_afterwards(
    client: httpx.AsyncClient, store: Store, postgresql: PostgresServer
) -> None:
    postgresql.stop()
    try:
        answers = [await client.post("/v1/chat/completions", json=CHAT) for _ in range(3)]
    finally:
        postgresql.start()
    assert [answer.status_code for answer in answers] == [200] * 3
    deadline = time.monotonic() + 20
    while await asyncio.to_thread(stored, store) < 3:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_feedback_error_during_a_database_outage_does_not_name_the_database(
    client: httpx.AsyncClient, postgresql: PostgresServer
) -> None:
    postgresql.stop()
    try:
        answer = await client.post("/v1/feedback", json={"request_id": "req-1", "rating": "good"})
    finally:
        postgresql.start()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert str(postgresql.folder) not in answer.text


@pytest.mark.slow
async def test_event_loop_is_not_blocked_by_a_database_that_does_not_respond(
    client: httpx.AsyncClient, postgresql: PostgresServer
) -> None:
    with postgresql.frozen():
        began = time.monotonic()
        for _ in range(5):
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert time.monotonic() - began < 2
