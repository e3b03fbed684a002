"""The reasons why requests fail, as shown to clients and counted in metrics, and the request outcome for each
reason."""

from collections.abc import Callable
from enum import StrEnum
from typing import TypeVar

from svc.errors import SvcError
from svc.store.requests import RequestOutcome

_Error = TypeVar("_Error", bound=type[SvcError])


class ErrorCode(StrEnum):
    """Values of `error.code` in responses and of `reason` in svc_request_errors_total."""

    INVALID_JSON = "invalid_json"
    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    TOO_MANY_TOKENS = "too_many_tokens"
    ANSWER_TOO_LARGE = "answer_too_large"
    BODY_TOO_LARGE = "body_too_large"
    BODY_TIMEOUT = "body_timeout"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    INVALID_API_KEY = "invalid_api_key"
    PERMISSION_DENIED = "permission_denied"
    TOO_MANY_WRONG_KEYS = "too_many_wrong_keys"
    KEYS_UNAVAILABLE = "keys_unavailable"
    HOST_NOT_ALLOWED = "host_not_allowed"
    MODEL_NOT_FOUND = "model_not_found"
    CHANGE_CONFLICT = "change_conflict"
    CHANGE_REFUSED = "change_refused"
    GATE_FAILED = "gate_failed"
    MODEL_NOT_DELETABLE = "model_not_deletable"
    FINE_TUNING_DISABLED = "fine_tuning_disabled"
    JOB_ENDED = "job_ended"
    BATCH_ENDED = "batch_ended"
    FILE_TOO_LARGE = "file_too_large"
    STORAGE_LIMIT = "storage_limit"
    DISK_FULL = "disk_full"
    UPLOAD_ENDED = "upload_ended"
    FILE_IN_USE = "file_in_use"
    FILE_CONTENT_MISSING = "file_content_missing"
    REQUEST_NOT_FOUND = "request_not_found"
    REQUEST_LOG_BUSY = "request_log_busy"
    STORE_UNAVAILABLE = "store_unavailable"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"
    OVERLOADED = "overloaded"
    QUEUE_OVERFLOW = "queue_overflow"
    QUEUE_TIMEOUT = "queue_timeout"
    ENGINE_UNAVAILABLE = "engine_unavailable"
    ENGINE_DIED = "engine_died"
    ENGINE_ADAPTER_FAILED = "engine_adapter_failed"
    ENGINE_TIMEOUT = "engine_timeout"
    ENGINE_ERROR = "engine_error"
    INTERNAL_ERROR = "internal_error"
    CLIENT_GONE = "client_gone"
    """The client has disconnected. Like CLIENT_SLOW, this code is counted but never sent."""
    CLIENT_SLOW = "client_slow"


CLIENT_FAULTS = frozenset(
    {
        ErrorCode.INVALID_JSON,
        ErrorCode.INVALID_REQUEST,
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        ErrorCode.TOO_MANY_TOKENS,
        ErrorCode.ANSWER_TOO_LARGE,
        ErrorCode.BODY_TOO_LARGE,
        ErrorCode.BODY_TIMEOUT,
        ErrorCode.UNSUPPORTED_MEDIA_TYPE,
        ErrorCode.MODEL_NOT_FOUND,
        ErrorCode.RATE_LIMIT_EXCEEDED,
        ErrorCode.CLIENT_GONE,
        ErrorCode.CLIENT_SLOW,
    }
)
"""Failures caused by the client. A request that fails for such a reason still counts toward its key's
requests-per-minute limit."""
_OUTCOMES = {
    ErrorCode.CLIENT_GONE: RequestOutcome.CLIENT_GONE,
    ErrorCode.CLIENT_SLOW: RequestOutcome.CLIENT_SLOW,
    ErrorCode.ENGINE_DIED: RequestOutcome.ENGINE_ERROR,
    ErrorCode.ENGINE_ADAPTER_FAILED: RequestOutcome.ENGINE_ERROR,
    ErrorCode.ENGINE_TIMEOUT: RequestOutcome.ENGINE_ERROR,
    ErrorCode.ENGINE_ERROR: RequestOutcome.ENGINE_ERROR,
    ErrorCode.INTERNAL_ERROR: RequestOutcome.SERVER_ERROR,
}


def outcome_of(reason: ErrorCode | None) -> RequestOutcome:
    """Return a request's outcome. `reason` is the reason for its failure, or None if the request succeeded."""
    return RequestOutcome.COMPLETE if reason is None else _OUTCOMES.get(reason, RequestOutcome.REFUSED)


ANSWERS: dict[type[SvcError], tuple[int, ErrorCode]] = {}
"""The HTTP status and error code with which each error is answered. Subclasses are answered like their parent."""


def answered_with(status: int, code: ErrorCode) -> Callable[[_Error], _Error]:
    """Declare how an error is answered. Its message is then shown to clients, so it must not contain a path.

    Args:
        status: the HTTP status.
    """

    def declare(error: _Error) -> _Error:
        ANSWERS[error] = (status, code)
        return error

    return declare
