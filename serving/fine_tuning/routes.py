"""OpenAI's endpoints for fine-tuning jobs, `/v1/fine_tuning/jobs`.

They only record jobs in the store. A worker trains the models (serving.fine_tuning.worker).
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from sqlalchemy import Engine as Store
from starlette.responses import JSONResponse, Response

from serving.fine_tuning.creation import Client, JobCreation, require_enabled
from serving.fine_tuning.request import AUTO, DpoHyperparameters, Hyperparameters, JobRequest
from serving.fine_tuning.request_rows import change_wanted, find_jobs
from serving.fine_tuning.rows import (
    Job,
    JobCheckpoint,
    JobEvent,
    Wanted,
    find_job,
    read_checkpoints,
    read_events,
    read_jobs,
)
from serving.http.actor import actor_of
from serving.http.body import ClientGoneError
from serving.http.json_body import read_json
from serving.http.listing import list_object, requested_page, unix_seconds
from serving.http.page import Page
from serving.http.request_state import request_state
from serving.protocols.request import InvalidRequestError
from serving.telemetry.metrics import CLIENT_GONE_STATUS
from svc.settings.settings import Settings
from svc.store.audit import Action, AuditEntry
from svc.store.statuses import JobStatus

MAX_BODY_BYTES = 64 * 1024
MAX_PAGE = 1000
_PATH = "/v1/fine_tuning/jobs"
_EXAMPLE = '{"model": "gpt-4o-mini-2024-07-18", "training_file": "file-..."}'
_EVENT = "ftevent-"
_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_Endpoint = Callable[[Request], Awaitable[Response]]


class FineTuning:
    """The endpoints for fine-tuning jobs.

    Args:
        creation: creates jobs.
    """

    def __init__(self, store: Store, settings: Settings, creation: JobCreation) -> None:
        self._store = store
        self._settings = settings
        self._creation = creation

    @property
    def enabled(self) -> bool:
        """Whether clients may train models."""
        return bool(self._settings.fine_tuning.bases)

    def add_to(self, app: FastAPI) -> None:
        job = f"{_PATH}/{{id}}"
        app.add_api_route(_PATH, self._if_enabled(self._create), methods=["POST"])
        app.add_api_route(_PATH, self._if_enabled(self._list), methods=["GET"])
        app.add_api_route(job, self._if_enabled(self._show), methods=["GET"])
        app.add_api_route(f"{job}/events", self._if_enabled(self._list_events), methods=["GET"])
        app.add_api_route(f"{job}/checkpoints", self._if_enabled(self._list_checkpoints), methods=["GET"])
        for name, wanted in (("cancel", Wanted.CANCEL), ("pause", Wanted.PAUSE), ("resume", Wanted.RUN)):
            app.add_api_route(f"{job}/{name}", self._if_enabled(self._change(wanted)), methods=["POST"])

    def _if_enabled(self, endpoint: _Endpoint) -> _Endpoint:
        async def answer(request: Request) -> Response:
            require_enabled(self._settings)
            return await endpoint(request)

        return answer

    async def _create(self, request: Request) -> Response:
        state = request_state(request.scope)
        try:
            given = await read_json(request, JobRequest, max_bytes=MAX_BODY_BYTES, expected=_EXAMPLE)
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE_STATUS)
        client = Client(state.owner, state.visible_owner, state.principal, actor_of(request))
        return self._answer(await self._creation.create(given, client))

    async def _list(self, request: Request) -> Response:
        page, owner = _page(request, default=20), request_state(request.scope).visible_owner
        metadata = _metadata(request)

        def answer() -> Response:
            if metadata == {}:
                jobs, more = read_jobs(self._store, owner, page=page)
            else:
                jobs, more = find_jobs(self._store, owner, page=page, metadata=metadata)
            return JSONResponse(list_object([self._object(job) for job in jobs], has_more=more))

        return await asyncio.to_thread(answer)  # 1,000 jobs take tens of milliseconds

    async def _show(self, request: Request) -> Response:
        return self._answer(await self._find(request))

    async def _list_events(self, request: Request) -> Response:
        page = _page(request, default=20)
        if page.after is not None:
            page = replace(page, after=event_number(str(page.after)))
        job = await self._find(request)

        def answer() -> Response:
            events, more = read_events(self._store, job.id, page=page)
            return JSONResponse(list_object([event_object(event) for event in events], has_more=more))

        return await asyncio.to_thread(answer)

    async def _list_checkpoints(self, request: Request) -> Response:
        page, job = _page(request, default=10), await self._find(request)
        checkpoints, more = await asyncio.to_thread(read_checkpoints, self._store, job.id, page=page)
        return JSONResponse(list_object([_checkpoint_object(each) for each in checkpoints], has_more=more))

    def _change(self, wanted: Wanted) -> _Endpoint:
        async def change(request: Request) -> Response:
            id, owner = request.path_params["id"], request_state(request.scope).visible_owner
            cancels = wanted is Wanted.CANCEL
            entry = AuditEntry(Action.CANCEL_JOB, id, actor_of(request)) if cancels else None
            return self._answer(await asyncio.to_thread(change_wanted, self._store, id, owner, wanted, entry))

        return change

    async def _find(self, request: Request) -> Job:
        owner = request_state(request.scope).visible_owner
        return await asyncio.to_thread(find_job, self._store, request.path_params["id"], owner)

    def _answer(self, job: Job) -> Response:
        return JSONResponse(self._object(job))

    def _object(self, job: Job) -> dict[str, Any]:
        return job_object(job, self._settings.fine_tuning.organization)


def job_object(job: Job, organization: str) -> dict[str, Any]:
    """Return a job in the format of OpenAI's API."""
    request = JobRequest.model_validate_json(job.request)
    values = request.values
    kind = "dpo" if isinstance(values, DpoHyperparameters) else "supervised"
    shown = _values(values)
    return {
        "object": "fine_tuning.job",
        "id": job.id,
        "created_at": unix_seconds(job.created_at),
        "finished_at": unix_seconds(job.finished_at),
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model if job.status is JobStatus.SUCCEEDED else None,
        "organization_id": organization,
        "status": job.status.value,
        "error": json.loads(job.error) if job.error else None,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": [job.result_file] if job.result_file else [],
        "hyperparameters": {key: value for key, value in shown.items() if key != "beta"},
        "method": {"type": kind, kind: {"hyperparameters": shown}},
        "seed": request.seed or 0,
        "trained_tokens": job.trained_tokens if job.status.ended else None,
        "estimated_finish": None if job.status.ended else unix_seconds(job.estimated_finish),
        "integrations": [each.model_dump(mode="json") for each in request.integrations or ()],
        "metadata": request.metadata,
    }


def _values(values: Hyperparameters) -> dict[str, Any]:
    return {key: AUTO if value is None else value for key, value in values}


def event_number(id: str) -> int | str:
    """Return the number in an event's client-facing id, or the text unchanged if it is not such an id."""
    number = id.removeprefix(_EVENT)
    known = number.isdecimal() and number.isascii() and len(number) <= 18
    return int(number) if known else id


def event_object(event: JobEvent) -> dict[str, Any]:
    """Return an event of a job in the format of OpenAI's API."""
    return {
        "object": "fine_tuning.job.event",
        "id": f"{_EVENT}{event.id}",
        "created_at": unix_seconds(event.at),
        "level": event.level.value,
        "type": event.type.value,
        "message": event.message,
        "data": json.loads(event.data) if event.data else {},
    }


def _checkpoint_object(checkpoint: JobCheckpoint) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": checkpoint.id,
        "created_at": unix_seconds(checkpoint.created_at),
        "fine_tuning_job_id": checkpoint.job,
        "fine_tuned_model_checkpoint": checkpoint.model,
        "step_number": checkpoint.step,
        "metrics": json.loads(checkpoint.metrics),
    }


def _page(request: Request, *, default: int) -> Page:
    return requested_page(request, max_limit=MAX_PAGE, default_limit=default)


def _metadata(request: Request) -> Mapping[str, str] | None:
    """Return the metadata to filter jobs by, from the query parameters `metadata[KEY]=VALUE`, or None for
    `metadata=null`, which selects jobs without metadata.

    Raises:
        InvalidRequestError: both forms are used, or `metadata` has a value other than `null`.
    """
    query = request.query_params
    wanted = {match[1]: value for key, value in query.items() if (match := _METADATA.fullmatch(key))}
    if (text := query.get("metadata")) is not None:
        if text != "null" or wanted:
            raise InvalidRequestError(
                "'metadata' is invalid", param="metadata", expected="metadata[KEY]=VALUE, or metadata=null"
            )
        return None
    return wanted
