"""Tests that connections are counted by peer."""

from serving.server.address_limit import AddressLimit


def test_disconnected_address_can_connect_again() -> None:
    limit = AddressLimit(1)
    assert limit.enter("10.0.0.1")
    assert not limit.enter("10.0.0.1")
    limit.leave("10.0.0.1")
    assert limit.enter("10.0.0.1")


def test_connection_limit_applies_per_ipv6_prefix_and_per_ipv4_address() -> None:
    cases: list[tuple[str, str, bool]] = [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
    ]
    for one, other, together in cases:
        limit = AddressLimit(1)
        limit.enter(one)
        assert limit.enter(other) is not together, one


def test_trusted_proxy_address_has_no_connection_limit() -> None:
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "2001:db8::1"):
        limit = AddressLimit(1, ["10.1.2.0/28", "2001:db8::/32"])
        assert [limit.enter(address) for _ in range(3)] == [True] * 3, address


def test_connection_limiter_stores_nothing_for_a_disconnected_address() -> None:
    limit = AddressLimit(2)
    for number in range(10):
        limit.enter(f"10.0.0.{number}")
        limit.leave(f"10.0.0.{number}")
    assert not limit._held
