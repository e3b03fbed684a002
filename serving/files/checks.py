"""Checks clients' files in the background, each in its own process (serving.files.content_check).

    uploaded ──▶ checked ──▶ processed
                         └──▶ error, with the reason

A file stays `uploaded` until its check has ended. When a server starts, it resumes checking these files. If the
contents are in an object store, any server may check a file that has not been checked within a minute by the server
that received it.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.files.client_files import ClientFiles
from serving.files.content_check import MAX_SECONDS, ContentCheck
from serving.files.rows import ClientFile, FileStatus, Purpose, read_unchecked, set_file_status
from serving.files.shared_contents import ContentDamagedError, ContentMissingError, ContentStoreError
from serving.http.page import EntryNotFoundError
from svc.store.database import is_sqlite
from svc.store.outage_log import log_store_error

log = logging.getLogger(__name__)

CheckContent = Callable[[Path, Purpose], Awaitable[ContentCheck]]
"""Type of `run_check`."""
_MAX_CHECKS = 2
_POLL_S = 5.0
_FETCH_AGAIN_S = 60.0
_LOST = "the content of the file has been lost"
_TAKE_OVER_AFTER = timedelta(minutes=1)
_SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # each thread would reserve memory


class FileChecks:
    """Checks uploaded files in the background.

    Args:
        check: function that checks a file's contents.
    """

    def __init__(self, store: Store, files: ClientFiles, check: CheckContent | None = None) -> None:
        self._store = store
        self._files = files
        self._check = check or run_check
        self._running: dict[asyncio.Task[None], ClientFile] = {}
        self._not_before: dict[str, float] = {}
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Look for unchecked files immediately. Call this in the event loop, after a file has been uploaded."""
        self._changed.set()

    async def run(self) -> None:
        """Check uploaded files as they arrive, until cancelled."""
        try:
            while True:
                self._changed.clear()
                await self._begin_checks()
                with contextlib.suppress(TimeoutError):  # until Python 3.12, wait_for can swallow a cancellation
                    async with asyncio.timeout(_POLL_S):
                        await self._changed.wait()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _begin_checks(self) -> None:
        """Start checks, oldest file first, up to the maximum number of checks and at most one per owner."""
        if len(self._running) >= _MAX_CHECKS:
            return
        try:
            unchecked = await asyncio.to_thread(self._read_unchecked)
        except SQLAlchemyError:
            log_store_error(log, "could not read the list of unchecked files")
            return
        for file in unchecked:
            owners = {running.owner for running in self._running.values()}
            if len(self._running) < _MAX_CHECKS and file.owner not in owners:
                task = asyncio.create_task(self._check_file(file))
                self._running[task] = file
                task.add_done_callback(self._ended)

    def _read_unchecked(self) -> list[ClientFile]:
        """Return the files to check, starting with those whose contents are on this machine. The contents of the others
        can be fetched.
        """
        here, elsewhere, long_ago = list[ClientFile](), list[ClientFile](), datetime.now(UTC) - _TAKE_OVER_AFTER
        now = time.monotonic()
        self._not_before = {id: moment for id, moment in self._not_before.items() if moment > now}
        for file in read_unchecked(self._store):
            if self._files.path(file.id).is_file():
                here.append(file)
            elif self._files.are_shared:
                if file.created_at < long_ago and file.id not in self._not_before:
                    elsewhere.append(file)
            elif is_sqlite(self._store):  # no other server can have it
                set_file_status(self._store, file.id, FileStatus.ERROR, _LOST)
        return here + elsewhere

    async def _check_file(self, file: ClientFile) -> None:
        try:
            result = await self._result(file)
            if result is not None:
                status = FileStatus.PROCESSED if result.usable else FileStatus.ERROR
                await asyncio.to_thread(set_file_status, self._store, file.id, status, result.details)
        except SQLAlchemyError:
            log_store_error(log, "could not store the result of checking file %s; checking it again", file.id)
            await asyncio.sleep(_POLL_S)

    async def _result(self, file: ClientFile) -> ContentCheck | None:
        """Return the result of checking a file, or None if its contents cannot be fetched now or were deleted."""
        try:
            path = await self._files.content(file.id)
        except EntryNotFoundError:
            return None
        except ContentDamagedError as error:
            return ContentCheck(False, error.wrong)
        except (ContentMissingError, ContentStoreError, OSError) as error:
            if isinstance(error, ContentMissingError) and is_sqlite(self._store):  # no other server can have it
                return ContentCheck(False, _LOST)
            log.warning("could not check file %s; retrying later: %s", file.id, error)
            self._not_before[file.id] = time.monotonic() + _FETCH_AGAIN_S
            return None
        return await self._check(path, file.purpose)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._changed.set()
        if not task.cancelled() and (error := task.exception()):
            log.error("unexpected error while checking a file", exc_info=error)


async def run_check(path: Path, purpose: Purpose, *, timeout_s: float = MAX_SECONDS) -> ContentCheck:
    """Check a file's contents in a separate process, which is killed after `timeout_s` seconds."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "serving.files.content_check", purpose.value, str(path)),
        env=os.environ | _SINGLE_THREADED,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(timeout_s):
            output, errors = await process.communicate()
    except TimeoutError:
        return ContentCheck(False, f"the file check did not finish within {timeout_s:g} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if process.returncode:
        log.error(
            "the process that checks %s exited with code %s: %s",
            path,
            process.returncode,
            errors[-2000:].decode("utf-8", "replace"),
        )
        if process.returncode == -signal.SIGXCPU:
            return ContentCheck(False, f"the file check did not finish within {timeout_s:g} s")
        return ContentCheck(False, "the file could not be checked; the server's log says why")
    return ContentCheck(**json.loads(output))
