"""`POST /v1/feedback`: what a person said of an answer, by the id that came with it in `x-request-id`.

A key rates the answers that it got itself; an admin, and whoever needs no key, all of them.
One word for each request; a second one replaces the first and is not counted again. A correction is kept whether or
not content is: who sends it wants it to be; it is redacted like content.
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
from serving.telemetry.metrics import CLIENT_GONE_STATUS
from serving.telemetry.request_log import RequestLog
from svc.errors import NotFoundError, SvcError
from svc.identity.principal import Scope
from svc.store.feedback import Feedback, KeptFeedback, Rating, keep_feedback
from svc.version import VersionId

MAX_BODY_BYTES = 256 * 1024
MAX_CORRECTION_CHARS = 32 * 1024
MAX_LABEL_CHARS = 64
_MOST_AT_ONCE = 64
_EXAMPLE = '{"request_id": ..., "rating": "good" or "bad"}, and if you like "correction" and "label"'
_FLUSH_S = 5.0


class RequestNotFoundError(NotFoundError):
    """A request id of which nothing is kept."""


class RequestLogBusyError(SvcError):
    """What is kept of requests is not up to date."""

    retry_after_s = 2


class FeedbackRequest(BaseModel):
    """The body."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request_id: str = Field(min_length=1, max_length=128)
    rating: Rating
    correction: str | None = Field(None, max_length=MAX_CORRECTION_CHARS)
    label: str | None = Field(None, max_length=MAX_LABEL_CHARS)


class FeedbackIntake:
    """Takes feedback and keeps it.

    Args:
        request_log: where a request may still be on its way to the store.
        on_given: hears the first word on each request.
    """

    def __init__(
        self, store: Store, request_log: RequestLog, on_given: Callable[[VersionId | None, Rating], None]
    ) -> None:
        self._store = store
        self._request_log = request_log
        self._on_given = on_given
        self._at_once = 0
        # Of its own: /metrics must not wait behind feedback that waits for the store.
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="feedback")

    async def answer(self, request: Request) -> Response:
        """The endpoint.

        Raises:
            OverloadedError: as much feedback as may be is being taken.
            RequestNotFoundError: nothing is kept of such a request.
            RequestLogBusyError: that cannot be said now.
            InvalidJsonError, InvalidRequestError: the body is not what it must be.
        """
        if self._at_once >= _MOST_AT_ONCE:
            raise OverloadedError(f"feedback on {self._at_once} answers is being taken", todo="send it again later")
        self._at_once += 1
        try:
            given = await read_json(request, FeedbackRequest, max_bytes=MAX_BODY_BYTES, expected=_EXAMPLE)
            principal = request_state(request.scope).principal
            key_id = None if principal is None or principal.may(Scope.ADMIN) else principal.key_id
            kept = await asyncio.get_running_loop().run_in_executor(self._threads, self._keep, given, key_id)
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE_STATUS)
        finally:
            self._at_once -= 1
        if kept.replaced is None:
            self._on_given(kept.version, given.rating)
        return JSONResponse(
            {
                "object": "feedback",
                "request_id": given.request_id,
                "rating": given.rating.value,
                "version": str(kept.version) if kept.version else None,
                "replaced": kept.replaced is not None,
            }
        )

    def _keep(self, given: FeedbackRequest, key_id: str | None) -> KeptFeedback:
        redacted = self._request_log.redacted
        feedback = Feedback(given.rating, redacted(given.label), redacted(given.correction))
        if self._request_log.is_queued(given.request_id) and not self._request_log.flush(_FLUSH_S):
            raise RequestLogBusyError("the request is not stored yet", todo="send the feedback again")
        kept = keep_feedback(self._store, given.request_id, feedback, key_id=key_id)
        if kept is None:
            raise RequestNotFoundError(
                "nothing is kept of this request", expected="the x-request-id of an answer that is not too old"
            )
        self._request_log.has_grown(kept.grown_bytes)
        return kept
