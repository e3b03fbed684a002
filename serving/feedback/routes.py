"""The `POST /v1/feedback` endpoint, with which clients rate an answer, identified by its `x-request-id`.

A key may rate only answers to its own requests. Admins, and clients that need no key, may rate all
answers. Each request has one rating; a second rating replaces the first and is not counted again. A
correction is stored even if content is not, because its sender wants it to be stored. Corrections are
redacted like content.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Engine as Store
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.admission.errors import OverloadedError
from serving.http.body import ClientGoneError
from serving.http.json_body import read_json
from serving.http.request_state import request_state
from serving.protocols.error_code import ErrorCode, answered_with
from serving.telemetry.metrics import CLIENT_GONE_STATUS
from serving.telemetry.request_log import RequestLog
from svc.errors import NotFoundError, SvcError
from svc.identity.principal import Scope
from svc.store.feedback import Feedback, KeptFeedback, Rating, keep_feedback
from svc.version import VersionId

MAX_BODY_BYTES = 256 * 1024
MAX_CORRECTION_CHARS = 32 * 1024
MAX_LABEL_CHARS = 64
_MAX_CONCURRENT = 64
_EXAMPLE = '{"request_id": ..., "rating": "good" or "bad"}, with an optional "correction" and "label"'
_FLUSH_S = 5.0


@answered_with(404, ErrorCode.REQUEST_NOT_FOUND)
class RequestNotFoundError(NotFoundError):
    """Raised when no request with the given id is stored."""


@answered_with(503, ErrorCode.REQUEST_LOG_BUSY)
class RequestLogBusyError(SvcError):
    """Raised when the rated request cannot be found yet, because it may still be waiting to be stored."""

    retry_after_s = 2


class FeedbackRequest(BaseModel):
    """Request body for rating an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request_id: str = Field(min_length=1, max_length=128)
    rating: Rating
    correction: str | None = Field(None, max_length=MAX_CORRECTION_CHARS)
    label: str | None = Field(None, max_length=MAX_LABEL_CHARS)


class FeedbackIntake:
    """Receives and stores feedback on answers.

    Args:
        request_log: the request log, which writes requests that are not stored yet and redacts texts.
        on_given: called with each request's first rating.
    """

    def __init__(
        self, store: Store, request_log: RequestLog, on_given: Callable[[VersionId | None, Rating], None]
    ) -> None:
        self._store = store
        self._request_log = request_log
        self._on_given = on_given
        self._at_once = 0
        # Separate threads: requests to /metrics must not wait behind feedback that waits for the store.
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="feedback")

    async def answer(self, request: Request) -> Response:
        """Store the feedback that a request contains, and return a confirmation.

        Raises:
            OverloadedError: too many feedback requests are being handled.
            RequestNotFoundError: no request with this id is stored.
            RequestLogBusyError: the rated request is still not stored after a few seconds.
            InvalidJsonError, InvalidRequestError: the body is not valid.
        """
        if self._at_once >= _MAX_CONCURRENT:
            raise OverloadedError(
                f"the server is already storing feedback on {self._at_once} answers",
                todo="send the feedback again later",
            )
        self._at_once += 1
        try:
            given = await read_json(request, FeedbackRequest, max_bytes=MAX_BODY_BYTES, expected=_EXAMPLE)
            principal = request_state(request.scope).principal
            key_id = None if principal is None or principal.may(Scope.ADMIN) else principal.key_id
            stored = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._store_feedback, given, key_id
            )
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE_STATUS)
        finally:
            self._at_once -= 1
        if stored.replaced is None:
            self._on_given(stored.version, given.rating)
        return JSONResponse(
            {
                "object": "feedback",
                "request_id": given.request_id,
                "rating": given.rating.value,
                "version": str(stored.version) if stored.version else None,
                "replaced": stored.replaced is not None,
            }
        )

    def _store_feedback(self, given: FeedbackRequest, key_id: str | None) -> KeptFeedback:
        redacted = self._request_log.redacted
        feedback = Feedback(given.rating, redacted(given.label), redacted(given.correction))
        if self._request_log.is_queued(given.request_id) and not self._request_log.flush(_FLUSH_S):
            raise RequestLogBusyError("the request being rated has not been stored yet", todo="send the feedback again")
        stored = keep_feedback(self._store, given.request_id, feedback, key_id=key_id)
        if stored is None:
            raise RequestNotFoundError(
                "no request with this id is stored",
                expected="the x-request-id of a stored request; old requests are deleted",
            )
        self._request_log.has_grown(stored.grown_bytes)
        return stored
