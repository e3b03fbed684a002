"""The answers to a batch's requests, stored as they arrive, so that no request is answered twice after an interruption.

Two files in the batch's folder contain the lines that later become the result files. An incomplete last line is removed
when the files are opened again, and its request counts as unanswered.
"""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from serving.batches.answer import BatchAnswer
from serving.batches.lines import expired_line, parse_result_line, result_line
from serving.batches.rows import BatchProgress
from serving.protocols.route import Route
from serving.protocols.wire_formats import wire_format

log = logging.getLogger(__name__)

OUTPUT_FILE, ERROR_FILE = "output.jsonl", "errors.jsonl"
RETRY_S = 10.0
"""Pause in seconds after a failed write, for example when the disk is full."""
_SYNC_S = 1.0


class _Lines(NamedTuple):
    """Lines to write together.

    Attributes:
        custom_ids: ids of the requests.
        body: the response, if there is only one line.
        written: future that is done when the lines are in the file.
    """

    data: bytes
    failed: bool
    custom_ids: Sequence[str]
    body: bytes
    written: asyncio.Future[None]


class _File:
    """A file to which lines are appended. If a write fails, the incomplete line is removed."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._size = os.fstat(self._descriptor).st_size

    def cut(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)
        self._size = size

    def append(self, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(data)

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def load_progress(folder: Path, route: Route) -> "Progress":
    """Return the progress of a batch, read from its files.

    Args:
        folder: the batch's folder, which is created if it does not exist.

    Raises:
        OSError: the files cannot be read or written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    progress = Progress(folder, route)
    try:
        progress.load()
    except BaseException:
        progress.close()
        raise
    return progress


class Progress:
    """The stored answers of one batch. Call `load` first, in a thread.

    Attributes:
        done: custom ids of all requests with a result.
        expired: number of requests that were not answered in time.
        counts: totals of answered requests, failed requests and tokens.
    """

    def __init__(self, folder: Path, route: Route) -> None:
        self._folder = folder
        self._format = wire_format(route)
        self._files: dict[bool, _File] = {}  # by whether the requests failed
        self._pending: list[_Lines] = []
        self._wanted = asyncio.Event()
        self._synced_at = 0.0
        self.done: set[str] = set()
        self.expired = 0
        self.counts = BatchProgress()

    def load(self) -> None:
        """Open the batch's output file and error file, and read the results that they already contain."""
        for failed, name in ((False, OUTPUT_FILE), (True, ERROR_FILE)):
            path, size = self._folder / name, 0
            self._files[failed] = _File(path)
            with path.open("rb") as file:
                for line in file:
                    if (result := parse_result_line(line)) is None:
                        break
                    size += len(line)
                    self._count(result.custom_id, bytes(result.response.body) if result.response else b"", failed)
                    self.expired += result.response is None
            self._files[failed].cut(size)

    async def add(self, custom_id: str, answer: BatchAnswer) -> None:
        """Store an answer. Return once it has been written."""
        failed = answer.status != 200
        await self._append(result_line(custom_id, answer), [custom_id], answer.body, failed=failed)

    async def add_expired(self, custom_ids: Sequence[str]) -> None:
        """Record that requests were not answered in time."""
        await self._append(b"".join(map(expired_line, custom_ids)), custom_ids, failed=True)
        self.expired += len(custom_ids)

    async def run(self) -> None:
        """Write new lines to the files as they arrive, until cancelled. All waiting lines are written together."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            pending, self._pending = self._pending, []
            for failed in (False, True):
                given = [lines for lines in pending if lines.failed is failed]
                if given:
                    await self._write(self._files[failed], b"".join(lines.data for lines in given))
                for lines in given:
                    for custom_id in lines.custom_ids:
                        self._count(custom_id, lines.body, failed)
                    if not lines.written.done():
                        lines.written.set_result(None)

    async def flush(self) -> None:
        """Wait until all answers that were passed to `add` have been written, even if the callers of `add` were
        cancelled.
        """
        await self._append(b"", (), failed=True)  # the failures are written last

    def close(self) -> None:
        """Flush the files to disk and close them. Call this in a thread, after `run` has been cancelled."""
        for file in self._files.values():
            try:
                file.sync()
            finally:
                file.close()

    async def _append(self, data: bytes, custom_ids: Sequence[str], body: bytes = b"", *, failed: bool) -> None:
        written = asyncio.get_running_loop().create_future()
        self._pending.append(_Lines(data, failed, custom_ids, body, written))
        self._wanted.set()
        await written

    async def _write(self, file: _File, data: bytes) -> None:
        while True:
            try:
                return await asyncio.to_thread(self._write_now, file, data)
            except OSError as error:
                log.error("could not write to %s; retrying: %s", self._folder, error)
                await asyncio.sleep(RETRY_S)

    def _write_now(self, file: _File, data: bytes) -> None:
        file.append(data)
        if time.monotonic() - self._synced_at >= _SYNC_S:
            file.sync()
            self._synced_at = time.monotonic()

    def _count(self, custom_id: str, body: bytes, failed: bool) -> None:
        self.done.add(custom_id)
        usage = None if failed else self._format.usage(body)
        self.counts = BatchProgress(
            completed=self.counts.completed + (not failed),
            failed=self.counts.failed + failed,
            tokens_in=self.counts.tokens_in + (usage.prompt if usage else 0),
            tokens_out=self.counts.tokens_out + (usage.completion if usage else 0),
        )
