"""The response to a request in a batch, and whether the request may be retried."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from serving.protocols.error_code import ErrorCode
from serving.protocols.route import Route

_TEMPORARY = frozenset(
    {
        ErrorCode.OVERLOADED,
        ErrorCode.QUEUE_OVERFLOW,
        ErrorCode.QUEUE_TIMEOUT,
        ErrorCode.ENGINE_UNAVAILABLE,
        ErrorCode.KEYS_UNAVAILABLE,
        ErrorCode.STORE_UNAVAILABLE,
    }
)
_OF_ENGINE = frozenset(
    {ErrorCode.ENGINE_DIED, ErrorCode.ENGINE_ADAPTER_FAILED, ErrorCode.ENGINE_TIMEOUT, ErrorCode.ENGINE_ERROR}
)


def is_temporary(code: ErrorCode | None, retry_after_s: float | None) -> bool:
    """Return whether an error means that the request has not reached an engine, and may be retried until its batch
    expires.
    """
    return code in _TEMPORARY or (code is ErrorCode.RATE_LIMIT_EXCEEDED and retry_after_s is not None)


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """A response to a request in a batch.

    Attributes:
        body: JSON.
        code: the error's code, or None for an answer with status 200.
        retry_after_s: seconds after which the request may be sent again, or None if not stated.
    """

    status: int
    request_id: str
    body: bytes
    code: ErrorCode | None = None
    retry_after_s: float | None = None

    @property
    def temporary(self) -> bool:
        """Whether the request has not reached an engine and may be sent again; see `is_temporary`."""
        return is_temporary(self.code, self.retry_after_s)

    @property
    def of_engine(self) -> bool:
        """Whether the engine failed, perhaps because of this request."""
        return self.code in _OF_ENGINE


Ask = Callable[[Route, bytes, str], Awaitable[BatchAnswer]]
"""Type of a function that answers a request in a batch.

The function takes the path, the body and the owner's key id, and raises InvalidKeyError or PermissionDeniedError if the
owner may no longer send requests.
"""
