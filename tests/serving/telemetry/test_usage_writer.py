"""Tests that key usage is stored while the server runs and when it stops, and is read by the next server."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy.exc import OperationalError

from serving.access.usage import DayOf, Usage, UsageOf, usage_by_day, usage_since
from serving.access.usage_meter import UsageMeter
from serving.access.used_elsewhere import UsedElsewhere
from serving.telemetry.usage_writer import UsageWriter

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


def writer(store: Store, meter: UsageMeter, known: list[Mapping[str, int]] | None = None) -> UsageWriter:
    """Return a writer that appends today's usage to a list."""
    return UsageWriter(store, meter, (known if known is not None else []).append, lambda used, servers: None, EVERY_S)


async def until_known(known: list[Any]) -> None:
    async with asyncio.timeout(5):
        while not known:
            await asyncio.sleep(EVERY_S)


async def test_usage_is_written_while_the_server_runs(store: Store) -> None:
    meter = UsageMeter(store)
    async with running(writer(store, meter)):
        meter.add("k1", "tuned", tokens_in=3, tokens_out=4)
        async with asyncio.timeout(5):
            while await asyncio.to_thread(in_store, store) != {"k1": Usage(1, 3, 4)}:
                await asyncio.sleep(EVERY_S)


def test_final_usage_is_written_at_shutdown(store: Store) -> None:
    meter = UsageMeter(store)
    meter.add("k1", "tuned", tokens_in=3, tokens_out=4)
    writer(store, meter).close()
    assert in_store(store) == {"k1": Usage(1, 3, 4)}


async def test_restarted_server_reads_the_usage_of_the_current_day(store: Store) -> None:
    earlier = UsageMeter(store, now=lambda: datetime.now(UTC) - timedelta(days=1))
    earlier.add("k1", "tuned", tokens_in=100, tokens_out=100)
    earlier.flush()
    meter = UsageMeter(store)
    for model in ("tuned", "other"):
        meter.add("k1", model, tokens_in=3, tokens_out=4)
    meter.add(None, "tuned", tokens_in=1, tokens_out=1)
    meter.flush()
    known = list[Mapping[str, int]]()
    async with running(writer(store, UsageMeter(store), known)):
        await until_known(known)
        await asyncio.sleep(3 * EVERY_S)
    assert known == [{"k1": 14}]


async def test_failed_usage_read_is_retried_without_counting_local_usage_twice(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[datetime]()

    def fails_once(of: Store, midnight: datetime) -> dict[DayOf, Usage]:
        asked.append(midnight)
        if len(asked) == 1:
            raise OperationalError("select", {}, Exception("locked"))
        return usage_by_day(of, midnight)

    monkeypatch.setattr("serving.access.used_elsewhere.usage_by_day", fails_once)
    meter, known = UsageMeter(store), list[Mapping[str, int]]()
    meter.add("k1", "tuned", tokens_in=3, tokens_out=4)
    async with running(writer(store, meter, known)):
        await until_known(known)
    assert known == [{}]


async def test_written_usage_is_not_kept_in_memory_when_no_other_server_shares_the_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered: list[Mapping[UsageOf, Usage]] = []
    monkeypatch.setattr(UsedElsewhere, "written", lambda self, usage: remembered.append(usage))
    meter = UsageMeter(store)
    one = writer(store, meter)
    for _ in range(3):
        meter.add("k1", "tuned", tokens_in=3, tokens_out=4)
        await one.exchange()
    assert len(remembered) == 1  # before the only reading
