"""Which names this server answers to.

A web page can have its own name lead to this machine (DNS rebinding), and then reads answers as if they were its own
site's. The name stands in the request's Host header: so a name must be known here. An address needs not, since no page
has one that is ours.
"""

import ipaddress
from collections.abc import Iterable
from functools import lru_cache

from serving.model_names import SHOWN_CHARS
from svc.errors import SvcError

ANY = "*"
_LOOPBACK = "localhost"
_LONGEST_ADDRESS = 45
"""Characters, of IPv6 with an IPv4 address at its end."""


class HostNotAllowedError(SvcError):
    """A request for a name that is not this server's."""


class AllowedHosts:
    """The names.

    Args:
        names: beside `localhost`; `*` allows all.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {_LOOPBACK, *(name.lower().rstrip(".") for name in names)}

    def check(self, header: bytes) -> None:
        """Check a request's Host header; a request without one, as of HTTP/1.0, is let through.

        Raises:
            HostNotAllowedError: it is another's name.
        """
        host = _name(header)
        if ANY in self._names or not host or host in self._names or _is_address(host):
            return
        raise HostNotAllowedError(
            f"this server is not called {host[:SHOWN_CHARS]!r}",
            expected="an address, localhost or a name in serve.allowed_hosts",
            todo="add the name to serve.allowed_hosts",
        )


@lru_cache(maxsize=256)
def _name(given: bytes) -> str:
    """Without the port, and brackets around an IPv6 address."""
    header = str(given, "latin-1")
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower().rstrip(".")


@lru_cache(maxsize=256)
def _is_address(host: str) -> bool:
    if len(host) > _LONGEST_ADDRESS:
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
