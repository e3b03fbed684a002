"""Tests how often a server without requests reads the store."""

import asyncio
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import event

from serving.store_changes.changes import FALLBACK_POLL_S
from svc.settings.settings import Settings
from tests.serving.home import Home
from tests.serving.versions import NAME

BASES = {"small": "/models/small"}
STARTED_S, IDLE_S = 5.0, 10.0


@pytest.mark.slow
async def test_idle_server_reads_each_database_table_only_every_few_seconds(home: Home, any_store: Store) -> None:
    home.store, counts = any_store, Counter[str]()
    home.settings = Settings.model_validate(home.settings.model_dump() | {"fine_tuning": {"bases": BASES}})

    def count(connection: object, cursor: object, statement: str, *rest: Any) -> None:
        query = " ".join(statement.split())
        if " FROM " in query:
            counts[query] += 1

    async with home.serving(f"{NAME}@1"):
        await asyncio.sleep(STARTED_S)
        event.listen(any_store, "before_cursor_execute", count)
        await asyncio.sleep(IDLE_S)
        event.remove(any_store, "before_cursor_execute", count)
    assert [number for query, number in counts.items() if query.startswith("SELECT batches.id")]
    twice = 2 * (IDLE_S / FALLBACK_POLL_S + 1)  # a server extends two leases
    assert not {query: number for query, number in counts.items() if number > twice}
