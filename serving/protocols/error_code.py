"""Why a request failed, in one word: for clients, and for the metric of failures."""

from enum import StrEnum


class ErrorCode(StrEnum):
    """`error.code` in answers and `reason` in svc_request_errors_total."""

    INVALID_JSON = "invalid_json"
    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    TOO_MANY_TOKENS = "too_many_tokens"
    ANSWER_TOO_LARGE = "answer_too_large"
    BODY_TOO_LARGE = "body_too_large"
    BODY_TIMEOUT = "body_timeout"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    HOST_NOT_ALLOWED = "host_not_allowed"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_NOT_DELETABLE = "model_not_deletable"
    REQUEST_NOT_FOUND = "request_not_found"
    REQUEST_LOG_BUSY = "request_log_busy"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    OVERLOADED = "overloaded"
    QUEUE_OVERFLOW = "queue_overflow"
    QUEUE_TIMEOUT = "queue_timeout"
    ENGINE_UNAVAILABLE = "engine_unavailable"
    ENGINE_DIED = "engine_died"
    ENGINE_TIMEOUT = "engine_timeout"
    ENGINE_ERROR = "engine_error"
    INTERNAL_ERROR = "internal_error"
    CLIENT_GONE = "client_gone"
    """Counted only, as the next: nobody is left to be answered."""
    CLIENT_SLOW = "client_slow"
