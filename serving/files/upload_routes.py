"""OpenAI's endpoints for files that are uploaded in parts, `/v1/uploads`."""

import asyncio
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Engine as Store
from starlette.responses import JSONResponse, Response

from serving.files.routes import expiry_of, file_object, storage_limits, upload_purpose
from serving.files.rows import ClientFile, StorageLimits, find_file, require_storage
from serving.files.upload_rows import (
    MAX_PARTS,
    Upload,
    UploadEndedError,
    UploadPart,
    UploadStatus,
    add_upload,
    find_upload,
    require_pending,
)
from serving.files.uploading import Uploading, too_large
from serving.files.uploads import ClientUploads
from serving.http.body import ClientGoneError
from serving.http.json_body import read_json
from serving.http.listing import unix_seconds
from serving.http.multipart import boundary_of, clean_name, read_form
from serving.http.page import EntryNotFoundError
from serving.http.request_state import request_state
from serving.http.threaded_body import ThreadedBody
from serving.protocols.request import InvalidRequestError
from serving.telemetry.metrics import CLIENT_GONE_STATUS
from svc.settings.client_apis import FilesSettings

MAX_PART_BYTES = 64 * 2**20
UPLOAD_HOURS = 1
_PATH = "/v1/uploads"
_MAX_BODY_BYTES = 512 * 1024  # the ids of 10,000 parts
_CREATE_EXAMPLE = '{"filename": "a.jsonl", "bytes": 1000, "mime_type": "text/jsonl", "purpose": "fine-tune"}'
_COMPLETE_EXAMPLE = '{"part_ids": ["part_..."]}'


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ExpiresAfter(_Body):
    """Expiry of the uploaded file."""

    anchor: Literal["created_at"]
    seconds: int


class CreateUploadRequest(_Body):
    """Request body for creating an upload."""

    filename: str
    bytes: int = Field(ge=1, le=2**53)
    mime_type: str = Field(max_length=255)
    purpose: str
    expires_after: ExpiresAfter | None = None


class CompleteUploadRequest(_Body):
    """Request body for completing an upload."""

    part_ids: list[Annotated[str, Field(max_length=100)]] = Field(min_length=1, max_length=MAX_PARTS)
    md5: Annotated[str, Field(pattern="^[0-9a-fA-F]{32}$")] | None = None


class Uploads:
    """Endpoints for files that are uploaded in parts.

    Args:
        uploading: receives the parts.
        on_uploaded: called each time an upload is completed.
    """

    def __init__(
        self,
        store: Store,
        uploads: ClientUploads,
        settings: FilesSettings,
        uploading: Uploading,
        on_uploaded: Callable[[], None],
    ) -> None:
        self._store = store
        self._uploads = uploads
        self._settings = settings
        self._uploading = uploading
        self._on_uploaded = on_uploaded

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route(_PATH, self._create, methods=["POST"])
        for name, endpoint in (("parts", self._add_part), ("complete", self._complete), ("cancel", self._cancel)):
            app.add_api_route(f"{_PATH}/{{id}}/{name}", endpoint, methods=["POST"])

    async def _create(self, request: Request) -> Response:
        try:
            given = await read_json(request, CreateUploadRequest, max_bytes=_MAX_BODY_BYTES, expected=_CREATE_EXAMPLE)
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE_STATUS)
        if given.bytes > self._settings.max_upload_bytes:
            raise too_large(self._settings.max_upload_bytes)
        purpose, now, expiry = upload_purpose(given.purpose), datetime.now(UTC), given.expires_after
        upload = Upload(
            f"upload_{secrets.token_hex(12)}",
            request_state(request.scope).owner,
            purpose,
            clean_name(given.filename, "filename"),
            given.bytes,
            now,
            now + timedelta(hours=UPLOAD_HOURS),
            expiry_of(expiry.anchor if expiry else None, expiry.seconds if expiry else None, purpose),
        )
        await asyncio.to_thread(self._add_upload, upload)
        return JSONResponse(upload_object(upload, None))

    def _add_upload(self, upload: Upload) -> None:
        require_storage(self._store, upload.owner, upload.bytes, self._limits)
        add_upload(self._store, upload)

    async def _add_part(self, request: Request) -> Response:
        boundary = boundary_of(request_state(request.scope).headers.get(b"content-type", b""))
        upload = await self._find(request)
        require_pending(upload)

        def save(body: ThreadedBody) -> UploadPart:
            return self._save_part(boundary, body, upload)

        try:
            part = await self._uploading.run(request, save, max_bytes=MAX_PART_BYTES)
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE_STATUS)
        return JSONResponse(part_object(part))

    def _save_part(self, boundary: bytes, body: ThreadedBody, upload: Upload) -> UploadPart:
        require_storage(self._store, upload.owner, 1, self._limits)
        watch = self._uploading.disk_watch()
        with self._uploads.writing_part(upload) as (id, writer):

            def write(block: bytes) -> None:
                if writer.bytes + len(block) > MAX_PART_BYTES:
                    raise too_large(MAX_PART_BYTES)
                watch(len(block))
                writer.write(block)

            read_form(boundary, body, file="data", fields=(), write=write)
            if not writer.bytes:
                raise InvalidRequestError("the part is empty", param="data")
            return self._uploads.add_part(upload, id, writer)

    async def _complete(self, request: Request) -> Response:
        try:
            given = await read_json(
                request, CompleteUploadRequest, max_bytes=_MAX_BODY_BYTES, expected=_COMPLETE_EXAMPLE
            )
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE_STATUS)
        upload = await self._find(request)
        if upload.status is UploadStatus.COMPLETED:  # the client's own retry
            return JSONResponse(upload_object(upload, await asyncio.to_thread(self._file, upload)))

        def complete() -> tuple[Upload, ClientFile]:
            return self._uploads.complete(
                upload, given.part_ids, md5=given.md5, limits=self._limits, on_write=self._uploading.disk_watch()
            )

        file: ClientFile | None
        try:
            upload, file = await self._uploading.in_thread(request, complete)
        except (UploadEndedError, EntryNotFoundError, FileNotFoundError):
            # Perhaps another request, such as the client's retry, has ended it meanwhile and deleted its parts.
            upload = await self._find(request)
            if upload.status is not UploadStatus.COMPLETED:
                require_pending(upload)
                raise
            file = await asyncio.to_thread(self._file, upload)
        self._on_uploaded()
        return JSONResponse(upload_object(upload, file))

    async def _cancel(self, request: Request) -> Response:
        id, owner = request.path_params["id"], request_state(request.scope).visible_owner
        return JSONResponse(upload_object(await asyncio.to_thread(self._uploads.cancel, id, owner), None))

    async def _find(self, request: Request) -> Upload:
        owner = request_state(request.scope).visible_owner
        return await asyncio.to_thread(find_upload, self._store, request.path_params["id"], owner)

    def _file(self, upload: Upload) -> ClientFile | None:
        try:
            return find_file(self._store, upload.file or "", upload.owner)
        except EntryNotFoundError:  # it has been deleted since
            return None

    @property
    def _limits(self) -> StorageLimits:
        return storage_limits(self._settings)


def upload_object(upload: Upload, file: ClientFile | None) -> dict[str, Any]:
    """Return an upload in the format of OpenAI's API."""
    return {
        "object": "upload",
        "id": upload.id,
        "purpose": upload.purpose.value,
        "filename": upload.filename,
        "bytes": upload.bytes,
        "created_at": unix_seconds(upload.created_at),
        "expires_at": unix_seconds(upload.expires_at),
        "status": upload.status.value,
        "file": None if file is None else file_object(file),
    }


def part_object(part: UploadPart) -> dict[str, Any]:
    """Return an upload part as an object in OpenAI's format."""
    return {
        "object": "upload.part",
        "id": part.id,
        "upload_id": part.upload,
        "created_at": unix_seconds(part.created_at),
    }
