"""Where the server of a home listens: what it says in the lock that it holds. And what it says when asked."""

from collections.abc import Mapping
from typing import Any

from svc.errors import ServerNotRunningError
from svc.lock import lock_holder
from svc.settings import Settings

LOCK_FILE = "serve.lock"
_TIMEOUT_S = 10.0


def server_url(settings: Settings) -> str:
    """The URL of the server that uses this home.

    Raises:
        ServerNotRunningError: there is none.
    """
    holder = lock_holder(settings.home / LOCK_FILE)
    if holder is None or "url" not in holder:
        raise ServerNotRunningError(f"no server runs on {settings.home}", todo="start it: svc serve NAME")
    return str(holder["url"])


def read_status(url: str) -> Mapping[str, Any]:
    """What a server's /svc/status says.

    Raises:
        ServerNotRunningError: it does not answer.
    """
    import httpx

    try:
        # The server is on this machine: a proxy from the environment would look for it elsewhere.
        answer = httpx.get(f"{url}/svc/status", timeout=_TIMEOUT_S, trust_env=False).raise_for_status()
        return dict(answer.json())
    except (httpx.HTTPError, ValueError) as error:
        raise ServerNotRunningError(
            f"the server on {url} does not answer: {error!r}", todo="see its log, then try again"
        ) from error
