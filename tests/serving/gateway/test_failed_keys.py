"""Tests that invalid keys are limited per peer, in a table of bounded size."""

import ipaddress

import pytest

from serving.gateway.failed_keys import _MAX_PEERS, MAX_INVALID_PER_MINUTE, FailedKeys, TooManyWrongKeysError
from tests.builders.clocks import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def failed(clock: Clock) -> FailedKeys:
    return FailedKeys(clock)


def spend(failed: FailedKeys, address: str) -> list[bool]:
    return [failed.add(address) for _ in range(MAX_INVALID_PER_MINUTE)]


def test_peer_is_rejected_once_its_invalid_key_attempts_reach_the_per_minute_limit(
    failed: FailedKeys, clock: Clock
) -> None:
    assert spend(failed, "10.0.0.1") == [False] * (MAX_INVALID_PER_MINUTE - 1) + [True]
    clock.now = 20.5
    with pytest.raises(TooManyWrongKeysError) as raised:
        failed.add("10.0.0.1")
    assert raised.value.retry_after_s == 40


def test_limit_on_invalid_keys_resets_after_one_minute(failed: FailedKeys, clock: Clock) -> None:
    spend(failed, "10.0.0.1")
    clock.now = 60.0
    assert spend(failed, "10.0.0.1")[-1]


def test_limit_on_invalid_keys_is_separate_for_each_peer(failed: FailedKeys) -> None:
    spend(failed, "10.0.0.1")
    assert not failed.add("10.0.0.2")


def test_ipv6_addresses_with_the_same_64_bit_prefix_share_the_limit_on_invalid_keys(failed: FailedKeys) -> None:
    spend(failed, "2001:db8::1")
    with pytest.raises(TooManyWrongKeysError):
        failed.add("2001:db8::ffff:2")


@pytest.mark.slow
def test_number_of_remembered_peers_with_invalid_keys_is_limited(failed: FailedKeys) -> None:
    for number in range(_MAX_PEERS + 1000):
        failed.add(str(ipaddress.ip_address(number + 2**24)))
    assert len(failed._peers) == _MAX_PEERS


def test_overlong_peer_address_is_truncated(failed: FailedKeys) -> None:
    failed.add("x" * 10_000)
    assert max(map(len, failed._peers)) <= 64
