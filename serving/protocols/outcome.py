"""How a request ended, by the reason of its failure."""

from serving.protocols.error_code import ErrorCode
from svc.store.requests import Outcome

_OUTCOMES = {
    ErrorCode.CLIENT_GONE: Outcome.CLIENT_GONE,
    ErrorCode.CLIENT_SLOW: Outcome.CLIENT_SLOW,
    ErrorCode.ENGINE_DIED: Outcome.ENGINE_ERROR,
    ErrorCode.ENGINE_ADAPTER_FAILED: Outcome.ENGINE_ERROR,
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
