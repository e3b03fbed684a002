"""How a request ended, by the reason of its failure."""

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
    """The outcome of a request.

    Args:
        reason: why it failed; None where it did not.
    """
    return RequestOutcome.COMPLETE if reason is None else _OUTCOMES.get(reason, RequestOutcome.REFUSED)
