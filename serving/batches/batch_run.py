"""Answers the requests of one batch.

input file ──▶ checked requests ──▶ answers in the batch's folder ──▶ result files
"""

import asyncio
import logging
import random
import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.batches.answer import Ask, BatchAnswer
from serving.batches.lines import RequestLine, RequestLines, read_request_lines
from serving.batches.progress import ERROR_FILE, OUTPUT_FILE, RETRY_S, Progress, load_progress
from serving.batches.rows import (
    Batch,
    BatchError,
    BatchProgress,
    BatchResult,
    begin_batch,
    end_batch,
    record_batch_progress,
)
from serving.files.batch_check import check_batch_file
from serving.files.client_files import ClientFiles
from serving.files.rows import FileStatus, Purpose
from serving.files.shared_contents import ContentDamagedError, ContentMissingError, ContentStoreError
from serving.http.page import EntryNotFoundError
from serving.protocols.error_code import ErrorCode
from serving.protocols.route import Route
from svc.errors import AuthenticationError, PermissionDeniedError
from svc.store.leases import Lease
from svc.store.outage_log import log_store_error
from svc.store.statuses import BatchStatus

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_ATTEMPTS = 3
"""Maximum number of attempts for a request whose engine dies or fails, so that a request that kills engines does not
kill every new one."""
_RECORD_S = 2.0
_MIN_PAUSE_S, _MAX_PAUSE_S = 0.5, 30.0
_COPY_BYTES = 1024 * 1024
_EXPIRED_TOGETHER = 1000


@dataclass(frozen=True, slots=True)
class BatchContext:
    """Dependencies and limits of all batches of a server.

    Attributes:
        folder: folder that contains a folder for each batch.
        ask: function that answers a request.
        lease: function that returns this server's lease for running batches, or None if no other server can use the
            store. It raises LeaseLostError if this server does not hold the lease.
        concurrency: maximum number of concurrent requests of one batch.
    """

    store: Store
    files: ClientFiles
    folder: Path
    ask: Ask
    lease: Callable[[], Lease | None]
    concurrency: int


class BatchFailedError(Exception):
    """Raised when a batch cannot continue."""

    def __init__(self, *errors: BatchError) -> None:
        super().__init__(errors[0].message)
        self.errors = errors


@dataclass(eq=False)
class BatchRun:
    """Runs one batch, starting from whatever state the batch is in.

    Attributes:
        cancelled: set when the batch's owner cancels it.
    """

    context: BatchContext
    batch: Batch
    cancelled: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def run(self) -> None:
        """Run the batch. If this task is cancelled, the batch can be resumed.

        Raises:
            LeaseLostError: this server no longer holds the lease for running batches.
        """
        folder, errors = self.context.folder / self.batch.id, tuple[BatchError, ...]()
        route = Route(self.batch.endpoint)
        progress = await _until_written(lambda: asyncio.to_thread(load_progress, folder, route))
        writing = asyncio.create_task(progress.run())
        try:
            try:
                await self._begin()
                if self.batch.status is BatchStatus.IN_PROGRESS:
                    await self._answer_until_end(progress)
            except BatchFailedError as error:
                errors = error.errors
            await progress.flush()
            await self._publish(progress, folder, errors)
        finally:
            writing.cancel()
            with suppress(asyncio.CancelledError):
                await writing
            with suppress(OSError):
                await asyncio.to_thread(progress.close)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _begin(self) -> None:
        """Check the input file of a new batch.

        Raises:
            BatchFailedError: the file is not valid.
        """
        if self.batch.status is not BatchStatus.VALIDATING or (path := await self._input()) is None:
            return
        try:
            check = await asyncio.to_thread(check_batch_file, path)
        except OSError as error:
            raise self._no_input(error) from error
        if check.problems:
            problems = [BatchError(each.code, each.message, each.line, each.param) for each in check.problems]
            raise BatchFailedError(*problems)
        if check.endpoints != {self.batch.endpoint}:
            others = ", ".join(sorted(check.endpoints - {self.batch.endpoint}))
            wrong = f"the requests are for {others}, but the batch is for {self.batch.endpoint}"
            raise BatchFailedError(BatchError("mismatched_endpoint", wrong, param="url"))
        model = check.models[0] if len(check.models) == 1 else None
        self.batch = await self._stored(
            lambda: begin_batch(
                self.context.store, self.batch.id, total=check.requests, model=model, lease=self.context.lease()
            )
        )

    async def _answer_until_end(self, progress: Progress) -> None:
        """Answer the requests until all are answered, the batch is cancelled, or it expires.

        Raises:
            BatchFailedError: the batch cannot continue.
        """
        left_s = (self.batch.expires_at - datetime.now(UTC)).total_seconds()
        work = asyncio.create_task(self._answer_all(progress))
        tasks = [work, asyncio.create_task(self.cancelled.wait()), asyncio.create_task(self._record(progress))]
        try:
            await asyncio.wait(tasks, timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)
            answered = work.done()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in tasks[::2]:
            if not task.cancelled():
                task.result()
        if not answered and not self.cancelled.is_set():
            await progress.flush()
            await self._expire(progress)

    async def _answer_all(self, progress: Progress) -> None:
        if (path := await self._input()) is None:
            return
        try:
            lines = RequestLines(path)
        except OSError as error:
            raise self._no_input(error) from error
        failures: list[BatchFailedError] = []
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(self.context.concurrency):
                    workers.create_task(self._work(lines, progress))
        except* BatchFailedError as group:
            failures += [error for error in group.exceptions if isinstance(error, BatchFailedError)]
        finally:
            lines.close()
        if failures:
            raise failures[0]

    async def _work(self, lines: RequestLines, progress: Progress) -> None:
        while (line := await lines.next()) is not None:
            if line.custom_id not in progress.done:
                await progress.add(line.custom_id, await self._answer(line))

    async def _answer(self, line: RequestLine) -> BatchAnswer:
        """Send a request, with retries, until it is answered or fails permanently."""
        route, body, failed, pauses = Route(self.batch.endpoint), bytes(line.body), 0, 0
        while True:
            try:
                answer = await self.context.ask(route, body, self.batch.owner)
            except AuthenticationError as error:
                raise BatchFailedError(BatchError("invalid_api_key", error.wrong)) from error
            except PermissionDeniedError as error:
                raise BatchFailedError(BatchError("permission_denied", error.wrong)) from error
            failed += answer.of_engine
            if not answer.temporary and not (answer.of_engine and failed < MAX_ATTEMPTS):
                return answer
            await asyncio.sleep(_pause_s(answer, pauses))
            pauses += 1

    async def _record(self, progress: Progress) -> None:
        """Record the number of answers at regular intervals. Never returns."""
        recorded = BatchProgress()
        while True:
            await asyncio.sleep(_RECORD_S)
            counts = progress.counts
            if counts != recorded:
                await self._record_now(counts)
                recorded = counts

    async def _record_now(self, counts: BatchProgress, *, finalizing: bool = False) -> None:
        def record() -> Batch:
            lease = self.context.lease()
            return record_batch_progress(self.context.store, self.batch.id, counts, lease=lease, finalizing=finalizing)

        self.batch = await self._stored(record)

    async def _expire(self, progress: Progress) -> None:
        """Store an expiry error for each unanswered request."""
        if (path := await self._input()) is None:
            return

        def read_open() -> list[str]:
            lines = read_request_lines(path)
            return [line.custom_id for line in lines if line.custom_id not in progress.done]

        try:
            open_ids = await asyncio.to_thread(read_open)
        except OSError as error:
            raise self._no_input(error) from error
        for start in range(0, len(open_ids), _EXPIRED_TOGETHER):
            await progress.add_expired(open_ids[start : start + _EXPIRED_TOGETHER])

    async def _publish(self, progress: Progress, folder: Path, errors: tuple[BatchError, ...]) -> None:
        """Create the result files, and mark the batch as ended."""
        counts = progress.counts
        await self._record_now(counts, finalizing=not errors)
        status = BatchStatus.EXPIRED if progress.expired else BatchStatus.COMPLETED
        result = BatchResult(
            BatchStatus.FAILED if errors else status,
            counts,
            output_file=await self._add_file(folder / OUTPUT_FILE, "output") if counts.completed else None,
            error_file=await self._add_file(folder / ERROR_FILE, "error") if counts.failed else None,
            errors=errors,
        )
        await self._stored(lambda: end_batch(self.context.store, self.batch.id, result, lease=self.context.lease()))

    async def _add_file(self, path: Path, kind: str) -> str:
        """Create a file for the owner from a result file, and return the new file's id."""

        def add() -> str:
            with path.open("rb") as source, self.context.files.writing() as (id, writer):
                while part := source.read(_COPY_BYTES):
                    writer.write(part)
                self.context.files.add(
                    id,
                    writer,
                    owner=self.batch.owner,
                    purpose=Purpose.BATCH_OUTPUT,
                    filename=f"{self.batch.id}_{kind}.jsonl",
                    status=FileStatus.PROCESSED,
                    expires_after_s=self.batch.output_expires_s,
                )
            return id

        return await _until_written(lambda: self._stored(add, run=self.context.files.in_thread))

    async def _stored(
        self,
        change: Callable[[], Result],
        run: Callable[[Callable[[], Result]], Awaitable[Result]] = asyncio.to_thread,
    ) -> Result:
        """Write to the store in a thread, retrying while the store is not responding."""
        while True:
            try:
                return await run(change)
            except SQLAlchemyError:
                log_store_error(log, "batch %s is waiting for the store", self.batch.id)
                await asyncio.sleep(RETRY_S)

    async def _input(self) -> Path | None:
        """Return the path of the input file's contents on this machine, or None if the batch is cancelled first.

        While the object store is not responding, this retries until the batch expires.

        Raises:
            BatchFailedError: the contents cannot be read.
        """
        while True:
            try:
                return await self.context.files.content(self.batch.input_file)
            except ContentDamagedError as error:
                raise BatchFailedError(_unavailable(error.wrong)) from error
            except (ContentMissingError, EntryNotFoundError) as error:
                raise self._no_input(error) from error
            except SQLAlchemyError:
                log_store_error(log, "batch %s is waiting for the store", self.batch.id)
            except (ContentStoreError, OSError) as error:
                if self.batch.expires_at <= datetime.now(UTC):
                    raise self._no_input(error) from error
                log.error("batch %s is waiting for its input file: %s", self.batch.id, error)
            with suppress(TimeoutError):
                async with asyncio.timeout(RETRY_S):
                    await self.cancelled.wait()
                return None

    def _no_input(self, error: Exception) -> BatchFailedError:
        log.error("could not read the input file of batch %s: %s", self.batch.id, error)
        wrong = f"the input file {self.batch.input_file} cannot be read; it may have been deleted"
        return BatchFailedError(_unavailable(wrong))


def _unavailable(message: str) -> BatchError:
    return BatchError("input_file_unavailable", message, param="input_file_id")


async def _until_written(write: Callable[[], Awaitable[Result]]) -> Result:
    """Call a function that writes to the disk or the object store, and retry while it fails, for example because the
    disk is full.
    """
    while True:
        try:
            return await write()
        except (OSError, ContentStoreError) as error:
            log.error("could not write a batch's files; retrying: %s", error)
            await asyncio.sleep(RETRY_S)


def _pause_s(answer: BatchAnswer, pauses: int) -> float:
    """Return the number of seconds after which a request is retried.

    The retry delay in a response is usually ignored, because it is meant for clients, which should not retry often. An
    engine that is starting may be ready much earlier.
    """
    pause_s: float = min(_MAX_PAUSE_S, _MIN_PAUSE_S * 2 ** min(pauses, 10))
    if answer.of_engine or answer.code is ErrorCode.RATE_LIMIT_EXCEEDED:
        pause_s = max(pause_s, answer.retry_after_s or 0.0)
    return pause_s + random.uniform(0.0, pause_s / 4)  # noqa: S311 - no secret
