"""Tests that all addresses of one peer are counted as one."""

from serving.http.peer import peer_of


def test_peer_is_the_ipv4_address_or_the_64_bit_prefix_of_the_ipv6_address() -> None:
    cases: list[tuple[str, str]] = [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:2", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("x" * 1000, "x" * 64),
    ]
    assert [address for address, peer in cases if peer_of(address) != peer] == []
