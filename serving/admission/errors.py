"""Why a request is not run, and when its client may send it again."""

from svc.errors import SvcError

OVERLOADED_RETRY_S = 1
"""Running requests end all the time."""
QUEUED_RETRY_S = 2
"""A swap in place takes one to two seconds once the running requests are done."""
ENGINE_RETRY_S = 20
"""An engine start takes about 40 s; an OpenAI client that retries twice spans it."""


class AdmissionError(SvcError):
    """A request that the engine never saw: the client may send it again.

    Attributes:
        retry_after_s: what the client is told to wait, seconds; below 120, because OpenAI clients ignore more.
    """

    retry_after_s: int = QUEUED_RETRY_S


class OverloadedError(AdmissionError):
    """As many requests run as may run, or they may make as many tokens as may be made."""

    retry_after_s = OVERLOADED_RETRY_S


class TooManyTokensError(SvcError):
    """A request that asks for more than may run at all."""


class RateLimitedError(SvcError):
    """A limit of the caller's key is reached.

    Args:
        limit: which.
        retry_after_s: until there is enough of it again, seconds; None where the same request can never run.
    """

    def __init__(self, wrong: str, *, limit: str, retry_after_s: int | None, todo: str = "") -> None:
        super().__init__(wrong, todo=todo)
        self.limit = limit
        self.retry_after_s = retry_after_s


class QueueOverflowError(AdmissionError):
    """The queue is full."""


class QueueTimeoutError(AdmissionError):
    """A queued request waited as long as it may."""


class EngineUnavailableError(AdmissionError):
    """There is no engine to run the request: it is starting, or it failed."""

    retry_after_s = ENGINE_RETRY_S
