"""Maps the reason of a request's failure to its outcome."""

from serving.protocols.error_code import ErrorCode
from svc.store.requests import RequestOutcome

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
    """Return a request's outcome; `reason` is None if the request succeeded."""
    return RequestOutcome.COMPLETE if reason is None else _OUTCOMES.get(reason, RequestOutcome.REFUSED)
