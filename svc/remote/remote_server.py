"""Sends requests to a server's administration API.

If the server returns an error, an error of the same class is raised here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svc.errors import (
    AuthenticationError,
    BusyError,
    GateError,
    NotFoundError,
    PermissionDeniedError,
    RefusedError,
    ServerNotRunningError,
    SettingsError,
    SvcError,
)
from svc.remote.server_url import ServerAddress, read_json

_ERRORS: Mapping[str, type[SvcError]] = {
    "invalid_api_key": AuthenticationError,
    "permission_denied": PermissionDeniedError,
    "not_found": NotFoundError,
    "change_conflict": BusyError,
    "change_refused": RefusedError,
    "job_ended": RefusedError,
    "fine_tuning_disabled": RefusedError,
    "gate_failed": GateError,
    "invalid_request": SettingsError,
    "host_not_allowed": SettingsError,
    "too_many_wrong_keys": AuthenticationError,
}
"""Error classes keyed by error code. Any other code becomes a ServerNotRunningError."""


@dataclass(frozen=True, slots=True)
class RemoteServer:
    """Client of a server's administration API."""

    address: ServerAddress

    def get(self, path: str, **query: str) -> dict[str, Any]:
        """Send a GET request and return the decoded response.

        Raises:
            SvcError: the server's error, or ServerNotRunningError for an invalid response.
        """
        return self._ask("GET", path, params=query)

    def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> dict[str, Any]:
        """Send a POST request with all values that are not None, and return the decoded response.

        Args:
            timeout_s: maximum time to wait for the response, in seconds, or None for the default.

        Raises:
            SvcError: see `get`.
        """
        given = {name: value for name, value in body.items() if value is not None}
        return self._ask("POST", path, timeout_s=timeout_s, json=given)

    def _ask(self, method: str, path: str, *, timeout_s: float | None = None, **given: Any) -> dict[str, Any]:
        import httpx

        url = self.address.url
        try:
            with self.address.client(timeout_s) if timeout_s else self.address.client() as client:
                answer = client.request(method, path, **given)
        except httpx.HTTPError as error:
            raise ServerNotRunningError(
                f"the server at {url} is not responding: {error!r}",
                todo="check that the server is running and that the URL is correct",
            ) from error
        content = read_json(url, answer)
        if answer.is_success and isinstance(content, dict):
            return content
        raise error_from_answer(url, answer.status_code, content, is_local=self.address.socket is not None)


def error_from_answer(url: str, status: int, answer: object, *, is_local: bool = False) -> SvcError:
    """Convert a server's error response to the error to raise.

    Args:
        answer: the decoded JSON, of any type.
        is_local: whether the server uses a home folder on this machine, in which case the error does not name the
            server's address.
    """
    content = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(content, dict):
        return ServerNotRunningError(f"{url} responded with status {status}, but not in this service's format")
    kind = _ERRORS.get(str(content.get("code")), ServerNotRunningError)
    wrong, expected, todo = (str(content.get(name) or "") for name in ("wrong", "expected", "todo"))
    wrong = wrong or str(content.get("message"))
    return kind(wrong if is_local else f"the server at {url} reported: {wrong}", expected=expected, todo=todo)
