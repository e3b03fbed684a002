"""Errors for requests that were not run. Each error states how long a client should wait before it retries."""

from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import SvcError

OVERLOADED_RETRY_S = 1
"""Retry delay when the server is at capacity, in seconds. It is short, because requests complete frequently."""
QUEUED_RETRY_S = 2
"""Retry delay while an engine is being replaced or reloaded, in seconds. An in-place swap takes one to two seconds once
the running requests are done."""
ENGINE_RETRY_S = 20
"""Retry delay while no engine is available, in seconds. The two retries of an OpenAI client leave enough time
for an engine to start (about 40 s)."""


class AdmissionError(SvcError):
    """Base class for errors about requests that never reached an engine and may be sent again.

    Attributes:
        retry_after_s: value of the Retry-After header, in seconds. It is below 120, because OpenAI's client
            ignores larger values.
    """

    retry_after_s: int = QUEUED_RETRY_S


@answered_with(429, ErrorCode.OVERLOADED)
class OverloadedError(AdmissionError):
    """Raised when the maximum number of requests is running, or the running requests have reserved all available
    tokens.
    """

    retry_after_s = OVERLOADED_RETRY_S


@answered_with(400, ErrorCode.TOO_MANY_TOKENS)
class TooManyTokensError(SvcError):
    """Raised when a single request needs more tokens than the limit for all running requests."""


@answered_with(429, ErrorCode.RATE_LIMIT_EXCEEDED)
class RateLimitedError(SvcError):
    """Raised when a limit of the caller's key has been reached.

    Args:
        limit: name of the limit.
        retry_after_s: seconds until enough quota is available, or None if a retry can never succeed.
    """

    def __init__(self, wrong: str, *, limit: str, retry_after_s: int | None, todo: str = "") -> None:
        super().__init__(wrong, todo=todo)
        self.limit = limit
        self.retry_after_s = retry_after_s


@answered_with(503, ErrorCode.QUEUE_OVERFLOW)
class QueueOverflowError(AdmissionError):
    """Raised when the queue is full."""


@answered_with(503, ErrorCode.QUEUE_TIMEOUT)
class QueueTimeoutError(AdmissionError):
    """Raised when a request has been queued for the maximum time."""


@answered_with(503, ErrorCode.ENGINE_UNAVAILABLE)
class EngineUnavailableError(AdmissionError):
    """Raised when no engine can run the request, for example because the engine is starting or has failed."""

    retry_after_s = ENGINE_RETRY_S
