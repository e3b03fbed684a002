"""Runs listeners for changes in the store."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import Engine as Store

from serving.store_changes.change_listener import ChangeListener
from serving.store_changes.changes import Changes
from serving.store_changes.sqlite_listener import SqliteListener
from svc.store.database import is_sqlite


@asynccontextmanager
async def listening(store: Store) -> AsyncIterator[Changes]:
    """Run a listener while the context is active."""
    changes = Changes()
    listener = SqliteListener if is_sqlite(store) else ChangeListener
    task = asyncio.create_task(listener(store, changes).run())
    try:
        yield changes
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait({task})
