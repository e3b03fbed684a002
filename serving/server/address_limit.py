"""Limits the number of connections from one address, so that no client can lock out all others."""

import ipaddress
from collections import Counter
from collections.abc import Iterable

from serving.http.peer import ip_of, peer_of


class AddressLimit:
    """Limits the number of connections per peer. A peer is an IPv4 address or an IPv6 /64 network.

    Args:
        most: maximum number of connections from one peer.
        unlimited: networks without a limit, such as the network of a proxy, which connects on behalf of many clients.
    """

    def __init__(self, most: int, unlimited: Iterable[str] = ()) -> None:
        self.most = most
        self._unlimited = [ipaddress.ip_network(network) for network in unlimited]
        self._held: Counter[str] = Counter()

    def enter(self, address: str) -> bool:
        """Count a connection as open until `leave` is called, or return False if its peer already has too many
        connections.
        """
        peer = peer_of(address)
        if self._held[peer] >= self.most and not self._is_unlimited(address):
            return False
        self._held[peer] += 1
        return True

    def leave(self, address: str) -> None:
        peer = peer_of(address)
        self._held[peer] -= 1
        if not self._held[peer]:
            del self._held[peer]

    def _is_unlimited(self, address: str) -> bool:
        ip = ip_of(address)
        return ip is not None and any(ip in network for network in self._unlimited)
