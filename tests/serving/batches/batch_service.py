"""A service with the Batch API, clients' files, and the official client over a real server."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from openai import AsyncOpenAI
from openai.types import Batch
from sqlalchemy import Engine as Store

from serving.batches.batch_run import BatchContext
from serving.batches.batch_runner import BatchRunner
from serving.files.rows import Purpose
from serving.store_changes.changes import Changes
from svc.store.statuses import BatchStatus
from tests.serving.fine_tuning.fine_tuning_service import FineTuningService
from tests.serving.service import CHAT

CHAT_PATH: Final = "/v1/chat/completions"


def line(custom_id: str, *, url: str = CHAT_PATH, **fields: Any) -> str:
    """Return a line of an input file: a chat request, with more fields in its body."""
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": CHAT | fields}) + "\n"


def lines(count: int, **fields: Any) -> str:
    """Return an input file with the ids `r0`, `r1`, ..."""
    return "".join(line(f"r{number}", **fields) for number in range(count))


class BatchService(FineTuningService):
    """A service whose clients may create batches.

    Attributes:
        leads: whether its runner runs batches.
        running: the batches that it runs.
    """

    running: Mapping[str, object]

    def __init__(self, folder: Path, *, store: Store, **settings: Any) -> None:
        super().__init__(folder, store=store, base=None, **settings)
        self.leads = True
        self.changes = Changes()

    def add_input(self, content: str, *, owner: str = "", **fields: Any) -> str:
        """Add an input file of a client and return its id."""
        return self.add_file(content, owner=owner, purpose=Purpose.BATCH, **fields)

    def content(self, file: str | None) -> dict[str, Any]:
        """Return the lines of a result file by their custom ids."""
        assert file is not None
        results = [json.loads(text) for text in self.files.path(file).read_text().splitlines()]
        by_id = {result["custom_id"]: result for result in results}
        assert len(by_id) == len(results)
        return by_id

    @asynccontextmanager
    async def running_batches(self, *, concurrency: int = 4) -> AsyncIterator[None]:
        """Run batches as the server does while the context is active. Leaving it abandons them."""
        assert self.store is not None
        context = BatchContext(
            self.store, self.files, self.folder / "batches", self.batch_requests.ask, lambda: None, concurrency
        )
        runner = BatchRunner(context, self.changes, lambda: self.leads, lambda: asyncio.sleep(0))
        self.running = runner._running
        task = asyncio.create_task(runner.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def create(client: AsyncOpenAI, file: str, **fields: Any) -> str:
    """Create a batch of chat requests, and return its id."""
    given: Any = {"input_file_id": file, "endpoint": CHAT_PATH, "completion_window": "24h"} | fields
    return (await client.batches.create(**given)).id


async def ended(client: AsyncOpenAI, id: str) -> Batch:
    """Return a batch after its end."""
    async with asyncio.timeout(20):
        while not BatchStatus((batch := await client.batches.retrieve(id)).status).ended:
            await asyncio.sleep(0.02)
    return batch
