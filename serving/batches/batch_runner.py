"""Runs batches while the server runs. If several servers share a store, only the leader for batches runs them.

A batch that was interrupted, because its server stopped or lost its lease, continues where it was interrupted.
"""

import asyncio
import logging
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from serving.batches.batch_run import BatchContext, BatchRun
from serving.batches.rows import Batch, read_open_batches
from serving.store_changes.changes import Changes
from svc.store.leases import LeaseLostError
from svc.store.outage_log import log_store_error
from svc.store.statuses import BatchStatus

log = logging.getLogger(__name__)

MAX_RUNNING = 8
"""Maximum number of batches that are answered at the same time."""
_POLL_S = 1.0
_PAUSE_S = 60.0


@dataclass(eq=False)
class BatchRunner:
    """Runs the open batches in the store.

    Attributes:
        changes: notifications about changes in the store, which `run` waits for while there is no open batch.
        leads: function that returns whether this server runs batches.
        ready: coroutine function that returns once the server answers requests.
    """

    context: BatchContext
    changes: Changes
    leads: Callable[[], bool]
    ready: Callable[[], Awaitable[object]]
    _clean: bool = field(default=False, init=False)  # whether leftovers have been removed since this server leads
    _running: dict[str, tuple[BatchRun, asyncio.Task[None]]] = field(default_factory=dict, init=False)

    async def run(self) -> None:
        """Run batches until this task is cancelled."""
        await self.ready()
        try:
            while True:
                count = self.changes.count
                if await self._step():
                    await asyncio.sleep(_POLL_S)
                else:
                    await self.changes.wait(count, _POLL_S)
        finally:
            await self._stop()

    async def _step(self) -> bool:
        """Start open batches, and stop batches that their owners have cancelled. Return whether there may be any open
        batches.
        """
        if not self.leads():
            self._clean = False
            await self._stop()
            return False
        try:
            batches = await asyncio.to_thread(read_open_batches, self.context.store)
            if not self._clean:
                await asyncio.to_thread(_remove_leftovers, self.context.folder, {batch.id for batch in batches})
                self._clean = True
        except SQLAlchemyError:
            log_store_error(log, "could not read the batches")
            return True
        for batch in batches:
            if batch.status is BatchStatus.CANCELLING and batch.id in self._running:
                self._running[batch.id][0].cancelled.set()
        for batch in next_batches(batches, {id: run.batch.owner for id, (run, _) in self._running.items()}):
            run = BatchRun(self.context, batch)
            task = asyncio.create_task(self._carry_out(run))
            self._running[batch.id] = run, task
            task.add_done_callback(lambda _, id=batch.id: self._running.pop(id))  # type: ignore[misc]
        return bool(batches)

    async def _carry_out(self, run: BatchRun) -> None:
        try:
            await run.run()
        except LeaseLostError:
            log.info("another server has taken over batch %s", run.batch.id)
        except Exception:  # the boundary: other batches continue
            log.exception("unexpected error in batch %s; resuming it in %.0f s", run.batch.id, _PAUSE_S)
            await asyncio.sleep(_PAUSE_S)

    async def _stop(self) -> None:
        tasks = [task for _, task in self._running.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _remove_leftovers(folder: Path, open_ids: Collection[str]) -> None:
    """Remove the folders of batches that have ended. A server that is killed while it finishes a batch leaves the
    folder behind.
    """
    for path in folder.iterdir() if folder.exists() else ():
        if path.name not in open_ids:
            shutil.rmtree(path, ignore_errors=True)


def next_batches(batches: Sequence[Batch], running: dict[str, str]) -> list[Batch]:
    """Return the batches to start now.

    All cancelled and expired batches are started, because they only need to be finalized. Other batches are started
    until `MAX_RUNNING` are running: each time, the oldest batch of the owner with the fewest running batches.

    Args:
        batches: all open batches, oldest first.
        running: owners of the running batches, keyed by batch id.
    """
    waiting, now = [batch for batch in batches if batch.id not in running], datetime.now(UTC)
    begun = [batch for batch in waiting if batch.status is BatchStatus.CANCELLING or batch.expires_at <= now]
    waiting = [batch for batch in waiting if batch not in begun]
    owners = Counter(running.values())
    for _ in range(MAX_RUNNING - len(running)):
        if not waiting:
            break
        chosen = min(waiting, key=lambda batch: owners[batch.owner])  # the first of several, which is the oldest
        owners[chosen.owner] += 1
        waiting.remove(chosen)
        begun.append(chosen)
    return begun
