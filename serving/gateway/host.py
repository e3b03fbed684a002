"""Checks the Host header of requests against the host names of this server.

A web page can make its own domain resolve to this machine (DNS rebinding) and then read responses as if
they came from its own site. The domain is in the request's Host header, so only configured names are
accepted there. IP addresses are always accepted: only a page loaded from that address could read the responses, and
this server serves no web pages.
"""

import ipaddress
from collections.abc import Iterable
from functools import lru_cache

from serving.engines.model_names import SHOWN_CHARS
from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import SvcError

ANY = "*"
_LOOPBACK = "localhost"
_MAX_ADDRESS_CHARS = 45
"""Maximum length of an IP address in text form: an IPv6 prefix followed by an IPv4 address."""


@answered_with(421, ErrorCode.HOST_NOT_ALLOWED)
class HostNotAllowedError(SvcError):
    """Raised when the Host header contains a name that does not belong to this server."""


class AllowedHosts:
    """The host names that requests may use to address this server.

    Args:
        names: names accepted in addition to `localhost`; `*` allows every name.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {_LOOPBACK, *(name.lower().rstrip(".") for name in names)}

    def check(self, header: bytes) -> None:
        """Check a request's Host header. A request without the header (HTTP/1.0) is accepted.

        Raises:
            HostNotAllowedError: the name in the header is not one of this server's names.
        """
        host = _name(header)
        if ANY in self._names or not host or host in self._names or _is_address(host):
            return
        raise HostNotAllowedError(
            f"the host name {host[:SHOWN_CHARS]!r} is not allowed",
            expected="an IP address, localhost or a name in `serve.allowed_hosts`",
            todo="add the name to `serve.allowed_hosts`",
        )


@lru_cache(maxsize=256)
def _name(given: bytes) -> str:
    """Return the host in a Host header without its port, and without brackets if it is an IPv6 address."""
    header = str(given, "latin-1")
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower().rstrip(".")


@lru_cache(maxsize=256)
def _is_address(host: str) -> bool:
    if len(host) > _MAX_ADDRESS_CHARS:
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
