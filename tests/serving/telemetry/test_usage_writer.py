"""Tests that key usage is stored while the server runs and when it stops, and is read by the next server."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy.exc import OperationalError

from serving.telemetry.usage_writer import UsageWriter
from svc.access.usage_meter import UsageMeter
from svc.store.usage import Usage, usage_since

EVERY_S = 0.01
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


@asynccontextmanager
async def running(writer: UsageWriter) -> AsyncIterator[None]:
    task = asyncio.create_task(writer.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def in_store(store: Store) -> dict[str, Usage]:
    return {total.key_id: total.usage for total in usage_since(store, LONG_AGO)}


async def until_known(known: list[Any]) -> None:
    async with asyncio.timeout(5):
        while not known:
            await asyncio.sleep(EVERY_S)


async def test_usage_is_written_while_the_server_runs(store: Store) -> None:
    meter = UsageMeter(store)
    async with running(UsageWriter(store, meter, on_known=lambda used: None, every_s=EVERY_S)):
        meter.add("k1", "tuned", tokens_in=3, tokens_out=4)
        async with asyncio.timeout(5):
            while await asyncio.to_thread(in_store, store) != {"k1": Usage(1, 3, 4)}:
                await asyncio.sleep(EVERY_S)


def test_final_usage_is_written_at_shutdown(store: Store) -> None:
    meter = UsageMeter(store)
    meter.add("k1", "tuned", tokens_in=3, tokens_out=4)
    UsageWriter(store, meter, on_known=lambda used: None).close()
    assert in_store(store) == {"k1": Usage(1, 3, 4)}


async def test_next_server_reads_todays_usage(store: Store) -> None:
    earlier = UsageMeter(store, now=lambda: datetime.now(UTC) - timedelta(days=1))
    earlier.add("k1", "tuned", tokens_in=100, tokens_out=100)
    earlier.flush()
    meter = UsageMeter(store)
    for model in ("tuned", "other"):
        meter.add("k1", model, tokens_in=3, tokens_out=4)
    meter.add(None, "tuned", tokens_in=1, tokens_out=1)
    meter.flush()
    known = list[Mapping[str, int]]()
    async with running(UsageWriter(store, UsageMeter(store), on_known=known.append, every_s=EVERY_S)):
        await until_known(known)
        await asyncio.sleep(3 * EVERY_S)
    assert known == [{"k1": 14}]


async def test_failed_usage_write_is_retried_without_counting_twice(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[datetime]()

    def fails_once(of: Store, since: datetime) -> Any:
        asked.append(since)
        if len(asked) == 1:
            raise OperationalError("select", {}, Exception("locked"))
        return usage_since(of, since)

    monkeypatch.setattr("serving.telemetry.usage_writer.usage_since", fails_once)
    meter, known = UsageMeter(store), list[Mapping[str, int]]()
    meter.add("k1", "tuned", tokens_in=3, tokens_out=4)
    async with running(UsageWriter(store, meter, on_known=known.append, every_s=EVERY_S)):
        await until_known(known)
    assert known == [{}]
