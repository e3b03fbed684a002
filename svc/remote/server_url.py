"""Reads the address of the server that uses a home folder from the server's lock file, and requests its status.

On the same machine, requests go through the socket in the server's home folder and need no key.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svc.errors import ServerNotRunningError, SettingsError
from svc.files.lock import lock_holder
from svc.identity.key_file import read_key
from svc.remote.listening import is_loopback
from svc.settings.settings import Settings

if TYPE_CHECKING:
    import ssl

    import httpx

LOCK_FILE = "serve.lock"
_TIMEOUT_S = 10.0
_CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A server's address and the credentials needed to reach it.

    Attributes:
        url: root URL, which is also displayed.
        socket: Unix socket in the server's home folder, or None to use the URL.
        key: API key sent with each request, or None if none is needed.
        authority: file with the CA certificates for verifying the server, or None to use the system's CA certificates.
    """

    url: str
    socket: Path | None = None
    key: str | None = field(default=None, repr=False)
    authority: Path | None = None

    @classmethod
    def with_key(cls, url: str, key_file: Path | None, authority: Path | None) -> "ServerAddress":
        """Return the address of the server at a URL, with the API key from the key file if one is given.

        Raises:
            SettingsError: the URL is invalid, the key would be sent over a network in plain text, or the key
                file is unusable.
        """
        from urllib.parse import urlsplit

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise SettingsError("the server URL is not valid", expected="https://HOST:PORT")
        if key_file and parts.scheme == "http" and not is_loopback(parts.hostname):
            raise SettingsError(
                f"the API key would be sent to {parts.hostname} unencrypted", todo="use https://, or a tunnel"
            )
        return cls(url.rstrip("/"), key=read_key(key_file) if key_file else None, authority=authority)

    def client(self, timeout_s: float = _TIMEOUT_S) -> "httpx.Client":
        """Return an HTTP client for the server.

        Args:
            timeout_s: maximum time without data from the server, in seconds.
        """
        import httpx

        # A proxy from the environment cannot know the name of a server on this machine.
        transport = httpx.HTTPTransport(uds=str(self.socket)) if self.socket else None
        return httpx.Client(
            headers={"authorization": f"Bearer {self.key}"} if self.key else None,
            verify=self._trusted(),
            base_url="http://localhost" if self.socket else self.url,
            transport=transport,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S)),
            trust_env=False,
        )

    def _trusted(self) -> "ssl.SSLContext | bool":
        if self.authority is None:
            return self.socket is None
        import ssl

        try:
            return ssl.create_default_context(cafile=str(self.authority))
        except OSError as error:
            raise SettingsError(
                f"{self.authority} cannot be used to verify the server: {error}", expected="PEM-encoded CA certificates"
            ) from error


def server_address(settings: Settings) -> ServerAddress:
    """Return the address of the server that is using this home folder.

    Raises:
        ServerNotRunningError: no server is running.
    """
    holder = lock_holder(settings.home / LOCK_FILE)
    if holder is None or "url" not in holder:
        raise ServerNotRunningError(
            f"no server is running for the home folder {settings.home}", todo="start it: svc serve NAME"
        )
    socket = holder.get("socket")
    return ServerAddress(str(holder["url"]), Path(socket) if socket else None)


def read_status(address: ServerAddress) -> Mapping[str, Any]:
    """Return the server's status from /svc/status.

    Raises:
        ServerNotRunningError: the server is not responding, or does not respond with JSON.
    """
    import httpx

    try:
        with address.client() as client:
            answer = client.get("/svc/status").raise_for_status()
    except httpx.HTTPError as error:
        raise ServerNotRunningError(
            f"the server at {address.url} is not responding: {error!r}", todo="check the server's log, then retry"
        ) from error
    return dict(read_json(address.url, answer))


def read_json(url: str, answer: "httpx.Response") -> Any:
    """Return the decoded JSON of a response.

    Raises:
        ServerNotRunningError: the response is not JSON, for example because a proxy responded with a web
            page.
    """
    try:
        return answer.json()
    except ValueError as error:
        raise ServerNotRunningError(
            f"{url} returned status {answer.status_code} with a body that is not JSON",
            todo="check that the URL points to the server, not to a proxy",
        ) from error
