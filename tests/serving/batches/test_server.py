"""Tests batches on a whole server: with idle models, changes of the version, and its end."""

import asyncio
from typing import Any

import httpx
import pytest

from serving.files.client_files import ClientFiles
from serving.files.rows import Purpose
from svc.settings.settings import Settings
from svc.store.desired import change_desired, read_desired
from tests.serving.batches.batch_service import lines
from tests.serving.home import Home
from tests.serving.versions import NAME, target

pytestmark = pytest.mark.slow

IDLE_S = 0.2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses of the runner."""
    monkeypatch.setattr("serving.batches.batch_runner._POLL_S", 0.05)
    monkeypatch.setattr("serving.batches.batch_run._RECORD_S", 0.05)


async def create(home: Home, client: httpx.AsyncClient, count: int) -> str:
    """Create a batch of chat requests and return its id."""
    files = ClientFiles(home.store, home.settings.home / "files")
    with files.writing() as (id, writer):
        writer.write(lines(count).encode())
        files.add(id, writer, owner="", purpose=Purpose.BATCH, filename="requests.jsonl")
    given = {"input_file_id": id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch_id: str = (await client.post("/v1/batches", json=given)).json()["id"]
    return batch_id


async def until_completed(client: httpx.AsyncClient, id: str, count: int) -> dict[str, Any]:
    """Wait until a number of requests in a batch are answered."""
    async with asyncio.timeout(20):
        while True:
            batch: dict[str, Any] = (await client.get(f"/v1/batches/{id}")).json()
            if batch["request_counts"]["completed"] >= count:
                return batch
            await asyncio.sleep(0.01)


async def ended(client: httpx.AsyncClient, id: str) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            batch: dict[str, Any] = (await client.get(f"/v1/batches/{id}")).json()
            if batch["status"] not in ("validating", "in_progress", "finalizing"):
                return batch
            await asyncio.sleep(0.01)


async def test_batch_wakes_an_idle_model_and_keeps_it_awake_until_the_batch_ends(home: Home) -> None:
    home.settings = Settings.model_validate({"home": home.settings.home, "serve": {"port": 0, "idle_s": IDLE_S}})
    async with home.serving(f"{NAME}@1") as client:
        async with asyncio.timeout(5):
            while home.park.alive:
                await asyncio.sleep(0.01)
        home.park.double.token_delay_s = IDLE_S / 2
        batch = await ended(client, await create(home, client, 20))
        assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", 20)
        assert len(home.park.engines) == 2


async def test_no_batch_request_fails_during_a_promotion(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as client:
        home.park.double.token_delay_s = 0.01
        id = await create(home, client, 150)
        await until_completed(client, id, 5)
        seen = read_desired(home.store, NAME)
        assert seen is not None
        change_desired(home.store, seen, target(2), seen.target)
        batch = await ended(client, id)
        assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", 150)
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == NAME


async def test_batch_resumes_after_a_server_restart(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as client:
        home.park.double.token_delay_s = 0.01
        id = await create(home, client, 150)
        await until_completed(client, id, 5)
        double = home.park.double
    asked = len(double.requests)
    async with home.serving(f"{NAME}@1") as client:
        batch = await ended(client, id)
        assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", 150)
        assert asked + len(home.park.double.requests) < 150 + 60  # also probes, and the interrupted requests
