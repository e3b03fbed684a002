"""How a request ended, for the metric of requests: a stream that broke has the status 200 and is no good answer."""

from enum import StrEnum

from serving.protocols.error_code import ErrorCode


class Outcome(StrEnum):
    """`outcome` in svc_requests_total."""

    COMPLETE = "complete"
    REFUSED = "refused"
    """Answered with an error, and not begun: the client's mistake, or no place for it now."""
    CLIENT_GONE = "client_gone"
    CLIENT_SLOW = "client_slow"
    """Cut off, because it took too little of its answer."""
    ENGINE_ERROR = "engine_error"
    SERVER_ERROR = "server_error"


_OUTCOMES = {
    ErrorCode.CLIENT_GONE: Outcome.CLIENT_GONE,
    ErrorCode.CLIENT_SLOW: Outcome.CLIENT_SLOW,
    ErrorCode.ENGINE_DIED: Outcome.ENGINE_ERROR,
    ErrorCode.ENGINE_TIMEOUT: Outcome.ENGINE_ERROR,
    ErrorCode.ENGINE_ERROR: Outcome.ENGINE_ERROR,
    ErrorCode.INTERNAL_ERROR: Outcome.SERVER_ERROR,
}


def outcome_of(reason: ErrorCode | None) -> Outcome:
    """The outcome of a request.

    Args:
        reason: why it failed; None where it did not.
    """
    return Outcome.COMPLETE if reason is None else _OUTCOMES.get(reason, Outcome.REFUSED)
