"""Runs uploads of files and of parts of files, each in its own thread, and limits how many run concurrently."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from starlette.requests import Request

from serving.http.body_slots import BodySlots
from serving.http.disconnect import while_connected
from serving.http.multipart import FORM_BYTES
from serving.http.request_state import RequestState, request_state
from serving.http.threaded_body import ThreadedBody
from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import PermissionDeniedError, SvcError
from svc.files.disk import is_full

MAX_UPLOADS = 16
"""Maximum number of concurrent uploads. One key or, without keys, one address may have at most half of them."""
_CHECK_DISK_EVERY = 64 * 2**20
Result = TypeVar("Result")


@answered_with(413, ErrorCode.FILE_TOO_LARGE)
class FileTooLargeError(SvcError):
    """Raised when an uploaded file is larger than the limit."""


@answered_with(507, ErrorCode.DISK_FULL)
class DiskFullError(SvcError):
    """Raised when the disk for clients' files is almost full."""


class Uploading:
    """Saves the bodies of upload requests in threads, at most `MAX_UPLOADS` at a time.

    Args:
        folder: folder on the disk that the uploads are written to.
        min_free_bytes: free disk space below which uploads are refused.
    """

    def __init__(self, folder: Path, *, min_free_bytes: int) -> None:
        self._folder = folder
        self._min_free_bytes = min_free_bytes
        self._slots = BodySlots(MAX_UPLOADS, "uploading files")
        self._threads = ThreadPoolExecutor(MAX_UPLOADS, "upload")

    async def run(self, request: Request, save: Callable[[ThreadedBody], Result], *, max_bytes: int) -> Result:
        """Call a function in a thread to save a request's body, and return its result.

        Args:
            save: function that reads and saves the body. If it fails, it must leave nothing behind.
            max_bytes: maximum size of the body, in bytes.

        Raises:
            ClientGoneError: the client disconnected.
            InvalidKeyError: the client's key became invalid.
            OverloadedError: too many uploads are running.
            FileTooLargeError, BodyTooLargeError, BodyTimeoutError: the body is too large or arrives too slowly.
            DiskFullError: the disk is almost full.
        """
        state = request_state(request.scope)
        _refuse_other_sites(state)
        size = int(state.headers.get(b"content-length", b"0"))  # uvicorn has checked that it is a number
        if size > max_bytes + FORM_BYTES:
            raise too_large(max_bytes)
        with self._slots.reading(state.caller):
            body = ThreadedBody(request.receive, max_bytes=max_bytes + FORM_BYTES)
            results: list[Result] = []
            await while_connected(state, self._run(body, lambda: results.append(self._saved(save, body, size))))
            return results[0]

    async def in_thread(self, request: Request, work: Callable[[], Result]) -> Result:
        """Run a function that writes a request's file in a thread, and return the function's result.

        Raises:
            OverloadedError: too many uploads are running.
            DiskFullError: the disk is full.
        """
        with self.writing(request):
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    @contextmanager
    def writing(self, request: Request) -> Iterator[None]:
        """Hold one of the slots for uploads while the `with` body writes a file for a request.

        Raises:
            OverloadedError: too many uploads are running.
            DiskFullError: the disk is full.
        """
        with self._slots.reading(request_state(request.scope).caller), self._full_disk_named():
            yield

    def disk_watch(self) -> Callable[[int], None]:
        """Return a function to be called with the size of each part before it is written.

        The function raises DiskFullError if the disk is almost full.
        """
        left = 0

        def watch(size: int) -> None:
            nonlocal left
            if left <= 0:
                self._require_space()
                left = _CHECK_DISK_EVERY
            left -= size

        return watch

    async def _run(self, body: ThreadedBody, work: Callable[[], None]) -> None:
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError:
            body.stop()
            await asyncio.wait([running])  # until nothing is left of it
            running.exception()  # else asyncio logs it
            raise
        running.result()

    def _saved(self, save: Callable[[ThreadedBody], Result], body: ThreadedBody, size: int) -> Result:
        self._require_space(size)
        with self._full_disk_named():
            return save(body)

    @contextmanager
    def _full_disk_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if is_full(error, self._folder):
                raise _disk_full() from error
            raise

    def _require_space(self, size: int = 0) -> None:
        if shutil.disk_usage(self._folder).free - size < self._min_free_bytes:
            raise _disk_full()


def too_large(max_bytes: int) -> FileTooLargeError:
    """Return the error for a file or part that is too large."""
    return FileTooLargeError("the file is too large", expected=f"at most {max_bytes} bytes")


def _disk_full() -> DiskFullError:
    return DiskFullError("the server's file storage is full", todo="delete files, or ask the operator for more space")


def _refuse_other_sites(state: RequestState) -> None:
    """Reject forms submitted by other sites' pages. Browsers send such forms to any address without a preflight
    request.

    A page has no key, so this matters only if no key is required.
    """
    origin = state.headers.get(b"origin")
    if origin is not None and state.principal is None:
        host = urlsplit(origin.decode("latin-1")).netloc
        if host != state.headers.get(b"host", b"").decode("latin-1"):
            raise PermissionDeniedError("web pages from other sites may not upload files", expected="no Origin header")
