"""Sends batch requests to the completion endpoints, within this process and without a network connection."""

import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive

from serving.access.authenticator import Grant, KeysUnavailableError
from serving.batches.answer import BatchAnswer, is_temporary
from serving.http.errors import ApiError, api_error
from serving.http.request_state import STATE_KEY, RequestState
from serving.one_shot_event import OneShotEvent
from serving.protocols.error_code import ErrorCode
from serving.protocols.route import Route
from svc.identity.principal import Principal, Scope

_HEADERS = {b"content-type": b"application/json"}
_RETRY_AFTER = "retry-after"


def is_repeated(error: ApiError) -> bool:
    """Return whether a batch request will be retried after an error. If so, the failed attempt is neither counted nor
    stored.
    """
    after = error.headers.get(_RETRY_AFTER)
    return is_temporary(error.code, None if after is None else float(after))


class BatchRequests:
    """Sends batch requests.

    Args:
        endpoints: ASGI applications that answer completions, by path.
        principal_of: function that returns the principal of a valid key, or raises the error with which its requests
            are rejected. See `serving.access.authenticator.Authenticator.valid_principal`.
    """

    def __init__(self, endpoints: Mapping[str, ASGIApp], principal_of: Callable[[str], Principal]) -> None:
        self._endpoints = endpoints
        self._principal_of = principal_of

    async def ask(self, route: Route, body: bytes, owner: str) -> BatchAnswer:
        """Send a request once there is spare capacity for it, and return the answer.

        Args:
            owner: id of the key that sends the request; empty for requests without a key.

        Raises:
            InvalidKeyError: the key was revoked or has expired.
            PermissionDeniedError: the key lacks the scope `infer`.
        """
        try:
            principal = self._principal_of(owner) if owner else None
        except KeysUnavailableError as error:
            return _answer_of(api_error(error))
        if principal:
            principal.require(Scope.INFER)
        state = RequestState(
            request_id=f"req-{secrets.token_hex(16)}",
            headers=_HEADERS,
            admitted=True,
            grant=Grant(principal) if principal else None,
            interruption=OneShotEvent(),
        )
        scope = {
            "type": "http",
            "method": "POST",
            "path": route.value,
            "headers": [*_HEADERS.items()],
            "state": {STATE_KEY: state},
        }
        response = _Response()
        await self._endpoints[route.value](scope, _receiving(body), response.send)
        return response.answer(state.request_id)


class _Response:
    """Collects the response that an ASGI application sends."""

    def __init__(self) -> None:
        self._status = 0
        self._headers: Mapping[str, str] = {}
        self._parts: list[bytes] = []

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status, self._parts = message["status"], []
            self._headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
        else:
            self._parts.append(message.get("body", b""))

    def answer(self, request_id: str) -> BatchAnswer:
        body = b"".join(self._parts)
        if self._status == 200:
            return BatchAnswer(self._status, request_id, body)
        after = self._headers.get(_RETRY_AFTER)
        code = ErrorCode(json.loads(body)["error"]["code"])
        return BatchAnswer(self._status, request_id, body, code, None if after is None else float(after))


def _answer_of(error: ApiError) -> BatchAnswer:
    return BatchAnswer(error.status, "", error.body(), error.code, float(error.headers[_RETRY_AFTER]))


def _receiving(body: bytes) -> Receive:
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    return receive
