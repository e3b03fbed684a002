"""The conversion of errors to responses, with their status, type, code and headers.

Clients get `{"error": {"message", "type", "param", "code"}}` for every status, as OpenAI's client expects. On
Anthropic's paths, `type` has Anthropic's values, and the object also contains `"type": "error"`. The code is also the
label under which the error is counted. A message never contains a path or a traceback: only errors that are declared
with `answered_with`, or listed here, show their own message, while all others are logged and answered as
`internal_error`. Administration endpoints show some errors that other endpoints do not (`change_error`).
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serving.engines.transport import EngineFailedError, EngineRefusedError
from serving.protocols.error_code import ANSWERS, ErrorCode
from serving.protocols.route import ANTHROPIC_PATHS
from svc.errors import (
    AuthenticationError,
    BusyError,
    GateError,
    IntegrityError,
    NotFoundError,
    PermissionDeniedError,
    RefusedError,
    RegistryError,
    SettingsError,
    SvcError,
)
from svc.identity.key_secret import hide_secrets
from svc.store.unavailable import StoreUnavailableError

log = logging.getLogger(__name__)
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}
_FINAL = frozenset(
    {
        ErrorCode.INTERNAL_ERROR,
        ErrorCode.JOB_ENDED,
        ErrorCode.BATCH_ENDED,
        ErrorCode.FILE_IN_USE,
        ErrorCode.DISK_FULL,
    }
)
"""Errors that a retry cannot resolve. A header tells clients not to retry the request, whatever the HTTP
status."""
_MAX_RETRY_S = 120
"""Maximum Retry-After value, in seconds. OpenAI's client ignores longer values, while Anthropic's client
waits for as long as the header tells it to."""


@dataclass(frozen=True, slots=True)
class ApiError:
    """An error in the form in which it is sent to clients.

    Attributes:
        parts: the `wrong`, `expected` and `todo` texts of the error, each of which `svc` shows on its own line.
    """

    status: int
    code: ErrorCode
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        """The error's type in OpenAI's API."""
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def anthropic_type(self) -> str:
        """The error's type in Anthropic's API."""
        return ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")

    def body(self, path: str = "") -> bytes:
        """Return the error as JSON, for a response or a stream event. Secrets sent by a client are masked.

        Args:
            path: the request's path.
        """
        param = self.param and hide_secrets(self.param)
        error = {"message": hide_secrets(self.message), "type": self.type, "param": param, "code": self.code.value}
        if path in ANTHROPIC_PATHS:
            return json.dumps({"type": "error", "error": {**error, "type": self.anthropic_type}}).encode("ascii")
        parts = {name: hide_secrets(text) for name, text in self.parts.items()}
        return json.dumps({"error": error | parts}).encode("ascii")

    def response(self, path: str = "") -> Response:
        """Return the complete error response.

        Clients retry after 429 and any 5xx status. The header `x-should-retry: false` prevents this when a retry would
        fail again or would have to wait for a long time.

        Args:
            path: the request's path.
        """
        headers = dict(self.headers)
        if self.code in _FINAL or (
            self.code is ErrorCode.RATE_LIMIT_EXCEEDED and not 0 < int(headers.get("retry-after", "0")) <= _MAX_RETRY_S
        ):
            headers["x-should-retry"] = "false"
        return Response(self.body(path), self.status, headers, media_type="application/json")


_SHARED: dict[type[SvcError], tuple[int, ErrorCode]] = {
    AuthenticationError: (401, ErrorCode.INVALID_API_KEY),
    PermissionDeniedError: (403, ErrorCode.PERMISSION_DENIED),
}
"""Errors of `svc`, which knows nothing of HTTP."""
ANSWERS.update(_SHARED)
_CHANGE_SHAPES: dict[type[Exception], tuple[int, ErrorCode]] = {
    NotFoundError: (404, ErrorCode.NOT_FOUND),
    BusyError: (409, ErrorCode.CHANGE_CONFLICT),
    GateError: (409, ErrorCode.GATE_FAILED),
    RefusedError: (409, ErrorCode.CHANGE_REFUSED),
    IntegrityError: (409, ErrorCode.CHANGE_REFUSED),
    SettingsError: (400, ErrorCode.INVALID_REQUEST),
    RegistryError: (503, ErrorCode.STORE_UNAVAILABLE),
    OSError: (409, ErrorCode.CHANGE_REFUSED),
}
"""HTTP status and error code for each error of the administration endpoints."""
_FRAMEWORK_CODES = {404: ErrorCode.NOT_FOUND, 405: ErrorCode.METHOD_NOT_ALLOWED}
_UNREAD_BODY = frozenset({ErrorCode.BODY_TOO_LARGE, ErrorCode.BODY_TIMEOUT, ErrorCode.UNSUPPORTED_MEDIA_TYPE})


def api_error(error: Exception) -> ApiError:
    """Convert an exception to the error that clients see. Unexpected exceptions are logged with a traceback."""
    if isinstance(error, SvcError):
        for kind in type(error).__mro__:
            if kind in ANSWERS:
                return _shaped(error, *ANSWERS[kind])
    if isinstance(error, HTTPException):
        return _framework_error(error)
    if isinstance(error, StoreUnavailableError):
        log.error("a request failed: %s", error)
        return ApiError(503, ErrorCode.STORE_UNAVAILABLE, "the server's database is not responding; retry later")
    log.error("unexpected error in a request", exc_info=error)
    return ApiError(500, ErrorCode.INTERNAL_ERROR, "internal error in the gateway; see the server's log")


def change_error(error: Exception) -> ApiError:
    """Convert an exception to an error with full details, for administration endpoints.

    Admins may see the machine's paths and details.
    """
    if isinstance(error, StoreUnavailableError):
        error = error.shown
    for kind, shape in _CHANGE_SHAPES.items():
        if isinstance(error, kind):
            told = error if isinstance(error, SvcError) else SvcError(str(error))
            parts = {"wrong": told.wrong, "expected": told.expected, "todo": told.todo}
            return replace(_shaped(told, *shape), parts=parts)
    return api_error(error)


def _shaped(error: SvcError, status: int, code: ErrorCode) -> ApiError:
    if isinstance(error, EngineFailedError):
        log.error("an engine failed to answer a request: %s", error.wrong)
        return ApiError(status, code, "the engine failed to answer this request; see the server's log")
    if isinstance(error, EngineRefusedError):
        status = error.status
    message = error.wrong
    if error.expected:
        message += f"; expected {error.expected}"
    if error.todo:
        message += f"; {error.todo}"
    headers = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["retry-after"] = str(retry_after_s)
    if code is ErrorCode.INVALID_API_KEY:
        headers["www-authenticate"] = "Bearer"
    if code in _UNREAD_BODY:
        headers["connection"] = "close"
    return ApiError(status, code, message, getattr(error, "param", None), headers)


def _framework_error(error: HTTPException) -> ApiError:
    fallback = ErrorCode.INTERNAL_ERROR if error.status_code >= 500 else ErrorCode.INVALID_REQUEST
    code = _FRAMEWORK_CODES.get(error.status_code, fallback)
    phrase = HTTPStatus(error.status_code).phrase.lower()
    return ApiError(
        error.status_code, code, f"{phrase}; see /v1/models for the served models", None, error.headers or {}
    )


def install_handlers(app: FastAPI) -> None:
    """Make errors from the framework and the FastAPI routes use OpenAI's error format."""

    async def answer(request: Request, error: Exception) -> Response:
        return api_error(error).response(request.url.path)

    for kind in (HTTPException, SvcError, StoreUnavailableError):
        app.add_exception_handler(kind, answer)
