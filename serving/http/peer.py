"""Map an address to the peer that it belongs to."""

import ipaddress
from functools import lru_cache

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_PREFIX_V6 = 64
"""Prefix length of the network assigned to an IPv6 subscriber, who can use any address in it."""
_MAX_CHARS = 64
"""Maximum length of a peer name that a proxy sent and that is not an address."""


def peer_of(address: str) -> str:
    """Return the part of an address that its owner cannot change at will: an IPv4 address or IPv6 network."""
    return _peer_of(address[:_MAX_CHARS])


@lru_cache(maxsize=256)
def _peer_of(address: str) -> str:
    ip = ip_of(address)
    if ip is None:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((ip, _PREFIX_V6), strict=False))
    return str(ip)


def ip_of(address: str) -> IPAddress | None:
    """Return a peer's IP address, or None if the text is not one. IPv4-mapped IPv6 is returned as IPv4."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return ip
