"""What is asked of a server's administration over HTTP, and the errors of there as those of here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svc.errors import (
    AuthenticationError,
    BusyError,
    NotFoundError,
    PermissionDeniedError,
    RefusedError,
    ServerNotRunningError,
    SettingsError,
    SvcError,
)
from svc.remote.server_url import ServerAddress

_ERRORS: Mapping[str, type[SvcError]] = {
    "invalid_api_key": AuthenticationError,
    "permission_denied": PermissionDeniedError,
    "not_found": NotFoundError,
    "change_conflict": BusyError,
    "change_refused": RefusedError,
    "invalid_request": SettingsError,
    "host_not_allowed": SettingsError,
    "too_many_wrong_keys": AuthenticationError,
}
"""By the code of the answer; any other one is a server that does not answer as it should."""


@dataclass(frozen=True, slots=True)
class RemoteServer:
    """A server that is asked with a key."""

    address: ServerAddress

    def get(self, path: str, **query: str) -> dict[str, Any]:
        """Reads something.

        Raises:
            SvcError: what the server says; ServerNotRunningError where it says nothing that can be understood.
        """
        return self._ask("GET", path, params=query)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Changes something; what is None is left out.

        Raises:
            SvcError: as `get`.
        """
        return self._ask("POST", path, json={name: value for name, value in body.items() if value is not None})

    def _ask(self, method: str, path: str, **given: Any) -> dict[str, Any]:
        import httpx

        url = self.address.url
        try:
            with self.address.client() as client:
                answer = client.request(method, path, **given)
                found = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ServerNotRunningError(
                f"the server on {url} does not answer: {error!r}", todo="see whether it runs, and the address"
            ) from error
        if answer.is_success and isinstance(found, dict):
            return found
        raise told_error(url, answer.status_code, found)


def told_error(url: str, status: int, answer: object) -> SvcError:
    """What a server's answer that is no success says.

    Args:
        answer: its JSON; anything where it is none.
    """
    told = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(told, dict):
        return ServerNotRunningError(f"{url} answers {status}, and not as a server of this service")
    kind = _ERRORS.get(str(told.get("code")), ServerNotRunningError)
    return kind(f"{url} says: {told.get('message')}")
