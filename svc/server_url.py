"""Where the server of a home listens: what it says in the lock that it holds."""

from svc.errors import ServerNotRunningError
from svc.lock import lock_holder
from svc.settings import Settings

LOCK_FILE = "serve.lock"


def server_url(settings: Settings) -> str:
    """The URL of the server that uses this home.

    Raises:
        ServerNotRunningError: there is none.
    """
    holder = lock_holder(settings.home / LOCK_FILE)
    if holder is None or "url" not in holder:
        raise ServerNotRunningError(f"no server runs on {settings.home}", todo="start it: svc serve NAME")
    return str(holder["url"])
