"""Errors of requests that are not run, with the time after which a client may retry."""

from svc.errors import SvcError

OVERLOADED_RETRY_S = 1
"""Running requests complete all the time."""
QUEUED_RETRY_S = 2
"""A swap in place takes one to two seconds once the running requests are done."""
ENGINE_RETRY_S = 20
"""An engine start takes about 40 s; an OpenAI client that retries twice spans it."""


class AdmissionError(SvcError):
    """The request never reached the engine: the client may send it again.

    Attributes:
        retry_after_s: value of retry-after, seconds; below 120, because OpenAI clients ignore more.
    """

    retry_after_s: int = QUEUED_RETRY_S


class OverloadedError(AdmissionError):
    """The maximum number of requests is running, or their answers may take the maximum number of tokens."""

    retry_after_s = OVERLOADED_RETRY_S


class TooManyTokensError(SvcError):
    """The request asks for more tokens than may ever run."""


class RateLimitedError(SvcError):
    """A limit of the caller's key is reached.

    Args:
        limit: name of the limit.
        retry_after_s: seconds until enough of it is free; None if the same request can never run.
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
    """There is no engine to run the request: it is starting, or it failed."""

    retry_after_s = ENGINE_RETRY_S
