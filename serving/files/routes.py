"""OpenAI's endpoints for files, `/v1/files`."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from sqlalchemy import Engine as Store
from starlette.datastructures import Headers
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from serving.files.client_files import ClientFiles
from serving.files.rows import (
    UPLOAD_PURPOSES,
    ClientFile,
    Purpose,
    StorageLimits,
    find_file,
    read_files,
    require_storage,
)
from serving.files.uploading import Uploading, too_large
from serving.http.body import ClientGoneError
from serving.http.error_answer import answer_error
from serving.http.errors import ApiError
from serving.http.listing import list_object, requested_page, unix_seconds
from serving.http.multipart import Form, boundary_of, clean_name, read_form
from serving.http.request_state import request_state
from serving.http.threaded_body import ThreadedBody
from serving.protocols.error_code import ErrorCode
from serving.protocols.request import InvalidRequestError
from serving.telemetry.metrics import CLIENT_GONE_STATUS
from svc.settings.client_apis import FilesSettings

MAX_PAGE = 10_000
_PATH = "/v1/files"
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_MIN_EXPIRY_S, _MAX_EXPIRY_S = 3600, 30 * 86_400
_RANGE_ERRORS = {
    400: "the header 'range' is malformed; expected for example bytes=0-1023",
    416: "the range is outside the file; its size is in the header 'content-range'",
}
_CONTENT_HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "sandbox",
    "cache-control": "no-store",
}


class _Content(FileResponse):
    """A response with the contents of a file. If the requested range is invalid, the response is an error in OpenAI's
    format.

    Starlette's own error response is plain text, from which OpenAI's client cannot extract an error message.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the contents, the requested part of them, or an error."""
        refused: Message | None = None

        async def send_content(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in _RANGE_ERRORS:
                refused = message
            elif refused is None:
                await send(message)

        await super().__call__(scope, receive, send_content)
        if refused is not None:
            size = Headers(raw=refused["headers"]).get("content-range")
            error = ApiError(
                refused["status"],
                ErrorCode.INVALID_REQUEST,
                _RANGE_ERRORS[refused["status"]],
                "range",
                {} if size is None else {"content-range": size},
            )
            await answer_error(error, scope, receive, send)


class Files:
    """The endpoints for files.

    Args:
        uploading: handles file uploads.
        on_uploaded: called after each upload.
    """

    def __init__(
        self,
        store: Store,
        files: ClientFiles,
        settings: FilesSettings,
        uploading: Uploading,
        on_uploaded: Callable[[], None],
    ) -> None:
        self._store = store
        self._files = files
        self._settings = settings
        self._uploading = uploading
        self._on_uploaded = on_uploaded

    def add_to(self, app: FastAPI) -> None:
        file = f"{_PATH}/{{id}}"
        app.add_api_route(_PATH, self._create, methods=["POST"])
        app.add_api_route(_PATH, self._list, methods=["GET"])
        app.add_api_route(file, self._show, methods=["GET"])
        app.add_api_route(file, self._delete, methods=["DELETE"])
        app.add_api_route(f"{file}/content", self._send_content, methods=["GET"])

    async def _create(self, request: Request) -> Response:
        state = request_state(request.scope)
        boundary, owner = boundary_of(state.headers.get(b"content-type", b"")), state.owner

        def save(body: ThreadedBody) -> ClientFile:
            return self._save(boundary, body, owner)

        try:
            file = await self._uploading.run(request, save, max_bytes=self._settings.max_bytes)
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE_STATUS)
        self._on_uploaded()
        return JSONResponse(file_object(file))

    def _save(self, boundary: bytes, body: ThreadedBody, owner: str) -> ClientFile:
        limits = storage_limits(self._settings)
        free, watch = require_storage(self._store, owner, 1, limits), self._uploading.disk_watch()
        with self._files.writing() as (id, writer):

            def write(part: bytes) -> None:
                size = writer.bytes + len(part)
                if size > self._settings.max_bytes:
                    raise too_large(self._settings.max_bytes)
                if size > free:
                    require_storage(self._store, owner, size, limits)
                watch(len(part))
                writer.write(part)

            form = read_form(boundary, body, file="file", fields=("purpose", _ANCHOR, _SECONDS), write=write)
            if not writer.bytes:
                raise InvalidRequestError("the file is empty", param="file")
            if form.filename is None:
                raise InvalidRequestError(
                    "the file has no name",
                    param="file",
                    expected="a `filename` in the Content-Disposition header of the form part",
                )
            purpose = upload_purpose(form.fields.get("purpose"))
            return self._files.add(
                id,
                writer,
                owner=owner,
                purpose=purpose,
                filename=clean_name(form.filename, "file"),
                expires_after_s=_expiry(form, purpose),
                limits=limits,
            )

    async def _list(self, request: Request) -> Response:
        page = requested_page(request, max_limit=MAX_PAGE, default_limit=MAX_PAGE)
        purpose, owner = request.query_params.get("purpose"), request_state(request.scope).visible_owner
        purposes = [each for each in Purpose if purpose in (None, "", each.value)]

        def answer() -> Response:
            files, more = read_files(self._store, owner, purposes, page=page)
            return JSONResponse(list_object([file_object(file) for file in files], has_more=more))

        return await asyncio.to_thread(answer)  # 10,000 files take tens of milliseconds

    async def _show(self, request: Request) -> Response:
        return JSONResponse(file_object(await self._find(request)))

    async def _delete(self, request: Request) -> Response:
        id, owner = request.path_params["id"], request_state(request.scope).visible_owner
        await asyncio.to_thread(self._files.delete, id, owner)
        return JSONResponse({"id": id, "object": "file", "deleted": True})

    async def _send_content(self, request: Request) -> Response:
        file = await self._find(request)
        path = await asyncio.to_thread(self._files.find, file.id)
        if path is None:
            with self._uploading.writing(request):
                path = await self._files.content(file.id)
        return _Content(path, headers=_CONTENT_HEADERS, media_type="application/octet-stream", filename=file.filename)

    async def _find(self, request: Request) -> ClientFile:
        owner = request_state(request.scope).visible_owner
        return await asyncio.to_thread(find_file, self._store, request.path_params["id"], owner)


def file_object(file: ClientFile) -> dict[str, Any]:
    """Return a file in the format of OpenAI's API."""
    return {
        "object": "file",
        "id": file.id,
        "purpose": file.purpose.value,
        "filename": file.filename,
        "bytes": file.bytes,
        "created_at": unix_seconds(file.created_at),
        "expires_at": unix_seconds(file.expires_at),
        "status": file.status.value,
        "status_details": file.status_details,
    }


def storage_limits(settings: FilesSettings) -> StorageLimits:
    """Return the storage limits that apply to each key."""
    return StorageLimits(int(settings.max_total_gb * 2**30), settings.max_files)


def upload_purpose(given: str | None) -> Purpose:
    """Return the purpose of a file that a client uploads.

    Raises:
        InvalidRequestError: the purpose is missing, or is not allowed for uploads.
    """
    purpose = next((each for each in UPLOAD_PURPOSES if each.value == given), None)
    if purpose is None:
        wrong = "the purpose is missing" if given is None else f"purpose {given[:100]!a} is not supported"
        raise InvalidRequestError(wrong, param="purpose", expected=" or ".join(each.value for each in UPLOAD_PURPOSES))
    return purpose


def expiry_of(anchor: str | None, after_s: int | None, purpose: Purpose) -> int | None:
    """Return the number of seconds after which a file expires, or None if it never expires.

    Args:
        anchor, after_s: the client's values; None if not sent.

    Raises:
        InvalidRequestError: only one of the two values is given, or one is invalid.
    """
    if anchor is None and after_s is None:
        return _MAX_EXPIRY_S if purpose is Purpose.BATCH else None  # as in OpenAI's API
    if anchor != "created_at" or after_s is None or not _MIN_EXPIRY_S <= after_s <= _MAX_EXPIRY_S:
        raise InvalidRequestError(
            "'expires_after' is invalid",
            param="expires_after",
            expected=f"'anchor' set to 'created_at', and 'seconds' from {_MIN_EXPIRY_S} to {_MAX_EXPIRY_S}",
        )
    return after_s


def _expiry(form: Form, purpose: Purpose) -> int | None:
    fields: Mapping[str, str] = form.fields
    text = fields.get(_SECONDS)
    after_s = None if text is None else int(text) if text.isdecimal() and text.isascii() and len(text) <= 9 else -1
    return expiry_of(fields.get(_ANCHOR), after_s, purpose)
