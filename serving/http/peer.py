"""Maps an address to a peer, the unit to which connection and request limits apply."""

import ipaddress
from functools import lru_cache

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_PREFIX_V6 = 64
"""Prefix length of the network assigned to an IPv6 subscriber. The subscriber can use any address in it."""
_MAX_CHARS = 64
"""Maximum length of a peer name sent by a proxy. Such a name need not be an IP address."""


def peer_of(address: str) -> str:
    """Return the peer that an address belongs to: the part of the address that its owner cannot change at will.

    This is an IPv4 address or an IPv6 network.
    """
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
    """Return a peer's IP address, or None if the text is not an address. IPv4-mapped IPv6 becomes IPv4."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return ip
