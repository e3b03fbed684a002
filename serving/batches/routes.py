"""OpenAI's endpoints for batches of requests, `/v1/batches`.

They only record batches in the store. The server answers the requests in the background (serving.batches).
"""

import asyncio
import json
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import FastAPI, Request
from sqlalchemy import Engine as Store
from starlette.responses import JSONResponse, Response

from serving.batches.request import BatchRequest
from serving.batches.rows import Batch, cancel_batch, create_batch, find_batch, read_batches
from serving.files.routes import storage_limits
from serving.files.rows import ClientFile, FileStatus, Purpose, find_file, require_storage
from serving.http.actor import actor_of
from serving.http.body import ClientGoneError
from serving.http.json_body import read_json
from serving.http.listing import list_object, requested_page, unix_seconds
from serving.http.page import EntryNotFoundError
from serving.http.request_state import request_state
from serving.protocols.request import InvalidRequestError
from serving.telemetry.metrics import CLIENT_GONE_STATUS
from svc.identity.principal import Scope
from svc.settings.client_apis import BatchSettings, FilesSettings
from svc.store.audit import Action, AuditEntry

MAX_BODY_BYTES = 64 * 1024
MAX_PAGE = 100
_PATH = "/v1/batches"
_EXAMPLE = '{"input_file_id": "file-...", "endpoint": "/v1/chat/completions", "completion_window": "24h"}'
_WINDOW = timedelta(hours=24)


class Batches:
    """The endpoints for batches.

    Args:
        files: limits on clients' files. A batch's answers are stored as files that belong to its owner.
    """

    def __init__(self, store: Store, settings: BatchSettings, files: FilesSettings) -> None:
        self._store = store
        self._settings = settings
        self._limits = storage_limits(files)

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route(_PATH, self._create, methods=["POST"])
        app.add_api_route(_PATH, self._list, methods=["GET"])
        app.add_api_route(f"{_PATH}/{{id}}", self._show, methods=["GET"])
        app.add_api_route(f"{_PATH}/{{id}}/cancel", self._cancel, methods=["POST"])

    async def _create(self, request: Request) -> Response:
        state = request_state(request.scope)
        if state.principal:
            state.principal.require(Scope.INFER)
        try:
            given = await read_json(request, BatchRequest, max_bytes=MAX_BODY_BYTES, expected=_EXAMPLE)
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE_STATUS)
        file = await asyncio.to_thread(_find_usable, self._store, given.input_file_id, state.visible_owner)
        # Before anything is answered: the answers are at least about as large as the requests.
        await asyncio.to_thread(require_storage, self._store, state.owner, file.bytes, self._limits)
        now, expiry = datetime.now(UTC), given.output_expires_after
        batch = Batch(
            id=f"batch_{secrets.token_hex(12)}",
            owner=state.owner,
            input_file=given.input_file_id,
            endpoint=given.endpoint,
            completion_window=given.completion_window,
            created_at=now,
            expires_at=now + _WINDOW,
            labels=None if given.metadata is None else json.dumps(given.metadata, sort_keys=True),
            output_expires_s=expiry.seconds if expiry else None,
        )
        details = {"endpoint": batch.endpoint, "input_file": batch.input_file}
        entry = AuditEntry(Action.CREATE_BATCH, batch.id, actor_of(request), details=details)
        try:
            created = await asyncio.to_thread(create_batch, self._store, batch, entry, max_open=self._settings.max_open)
        except EntryNotFoundError as error:  # the file has been deleted since
            raise _no_file(error) from error
        return JSONResponse(batch_object(created))

    async def _list(self, request: Request) -> Response:
        page = requested_page(request, max_limit=MAX_PAGE, default_limit=20)
        owner = request_state(request.scope).visible_owner
        batches, more = await asyncio.to_thread(read_batches, self._store, owner, page=page)
        return JSONResponse(list_object([batch_object(batch) for batch in batches], has_more=more))

    async def _show(self, request: Request) -> Response:
        owner = request_state(request.scope).visible_owner
        return JSONResponse(
            batch_object(await asyncio.to_thread(find_batch, self._store, request.path_params["id"], owner))
        )

    async def _cancel(self, request: Request) -> Response:
        id, owner = request.path_params["id"], request_state(request.scope).visible_owner
        entry = AuditEntry(Action.CANCEL_BATCH, id, actor_of(request))
        return JSONResponse(batch_object(await asyncio.to_thread(cancel_batch, self._store, id, owner, entry)))


def _find_usable(store: Store, id: str, owner: str | None) -> ClientFile:
    """Return a client's file for use as a batch's input. A file that has not been checked yet is accepted.

    Raises:
        InvalidRequestError: the file cannot be an input, or the client has no such file.
    """
    try:
        file = find_file(store, id, owner)
    except EntryNotFoundError as error:
        raise _no_file(error) from error
    if file.purpose is not Purpose.BATCH:
        raise InvalidRequestError(
            f"file {id} has purpose {file.purpose}",
            param="input_file_id",
            expected=f"purpose {Purpose.BATCH}",
        )
    if file.status is FileStatus.ERROR:
        raise InvalidRequestError(
            f"file {id} is not valid: {file.status_details or 'validation failed'}", param="input_file_id"
        )
    return file


def _no_file(error: EntryNotFoundError) -> InvalidRequestError:
    return InvalidRequestError(error.wrong, param="input_file_id", expected=error.expected)


def batch_object(batch: Batch) -> dict[str, Any]:
    """Return a batch in the format of OpenAI's API."""
    errors = json.loads(batch.errors) if batch.errors else None
    return {
        "object": "batch",
        "id": batch.id,
        "endpoint": batch.endpoint,
        "model": batch.model,
        "input_file_id": batch.input_file,
        "completion_window": batch.completion_window,
        "status": batch.status.value,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "errors": errors and {"object": "list", "data": errors},
        "created_at": unix_seconds(batch.created_at),
        "in_progress_at": unix_seconds(batch.in_progress_at),
        "expires_at": unix_seconds(batch.expires_at),
        "finalizing_at": unix_seconds(batch.finalizing_at),
        "completed_at": unix_seconds(batch.completed_at),
        "failed_at": unix_seconds(batch.failed_at),
        "expired_at": unix_seconds(batch.expired_at),
        "cancelling_at": unix_seconds(batch.cancelling_at),
        "cancelled_at": unix_seconds(batch.cancelled_at),
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": {
            "input_tokens": batch.tokens_in,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": batch.tokens_out,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": batch.tokens_in + batch.tokens_out,
        },
        "metadata": json.loads(batch.labels) if batch.labels else None,
    }
