"""Errors for requests that are not run, with the time after which a client may retry."""

from svc.errors import SvcError

OVERLOADED_RETRY_S = 1
"""Retry time for a full server; short, since running requests complete all the time."""
QUEUED_RETRY_S = 2
"""Retry time during a change: a swap in place takes one to two seconds once the running requests are done."""
ENGINE_RETRY_S = 20
"""Retry time for a missing engine: a start takes about 40 s, which two retries of an OpenAI client cover."""


class AdmissionError(SvcError):
    """Base of the errors for requests that never reached an engine and may be sent again.

    Attributes:
        retry_after_s: value of retry-after, seconds; below 120, because OpenAI's client ignores larger values.
    """

    retry_after_s: int = QUEUED_RETRY_S


class OverloadedError(AdmissionError):
    """The maximum number of requests is running, or their answers may use all available tokens."""

    retry_after_s = OVERLOADED_RETRY_S


class TooManyTokensError(SvcError):
    """The request asks for more tokens than may run at the same time."""


class RateLimitedError(SvcError):
    """A limit of the caller's key is reached.

    Args:
        limit: name of the limit.
        retry_after_s: seconds until enough of the limit is free; None if the same request can never run.
    """

    def __init__(self, wrong: str, *, limit: str, retry_after_s: int | None, todo: str = "") -> None:
        super().__init__(wrong, todo=todo)
        self.limit = limit
        self.retry_after_s = retry_after_s


class QueueOverflowError(AdmissionError):
    """The queue is full."""


class QueueTimeoutError(AdmissionError):
    """The queued request waited for the maximum time."""


class EngineUnavailableError(AdmissionError):
    """No engine can run the request, for example because the engine is starting or has failed."""

    retry_after_s = ENGINE_RETRY_S
