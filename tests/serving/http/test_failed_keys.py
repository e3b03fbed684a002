"""Wrong keys are limited by peer, in a table that does not grow."""

import ipaddress

import pytest

from serving.http.failed_keys import _MOST_PEERS, MOST_A_MINUTE, FailedKeys, TooManyWrongKeysError


class Clock:
    """A time that stands until it is moved."""

    at = 0.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def failed(clock: Clock) -> FailedKeys:
    return FailedKeys(clock)


def spend(failed: FailedKeys, address: str) -> list[bool]:
    return [failed.add(address) for _ in range(MOST_A_MINUTE)]


def test_one_more_than_a_minute_has_is_too_many(failed: FailedKeys, clock: Clock) -> None:
    assert spend(failed, "10.0.0.1") == [False] * (MOST_A_MINUTE - 1) + [True]
    clock.at = 20.5
    with pytest.raises(TooManyWrongKeysError) as raised:
        failed.add("10.0.0.1")
    assert raised.value.retry_after_s == 40


def test_the_next_minute_has_as_many(failed: FailedKeys, clock: Clock) -> None:
    spend(failed, "10.0.0.1")
    clock.at = 60.0
    assert spend(failed, "10.0.0.1")[-1]


def test_another_peer_has_its_own(failed: FailedKeys) -> None:
    spend(failed, "10.0.0.1")
    assert not failed.add("10.0.0.2")


@pytest.mark.parametrize(
    ("one", "other"),
    [("2001:db8::1", "2001:db8::ffff:2"), ("fe80::1%eth0", "fe80::2%eth1"), ("10.0.0.1", "::ffff:10.0.0.1")],
)
def test_addresses_that_one_peer_has_are_one(failed: FailedKeys, one: str, other: str) -> None:
    spend(failed, one)
    with pytest.raises(TooManyWrongKeysError):
        failed.add(other)


def test_the_table_does_not_grow(failed: FailedKeys) -> None:
    for number in range(_MOST_PEERS + 1000):
        failed.add(str(ipaddress.ip_address(number + 2**24)))
    assert len(failed) == _MOST_PEERS


def test_what_is_no_address_takes_little(failed: FailedKeys) -> None:
    failed.add("x" * 10_000)
    assert max(map(len, failed._peers)) <= 64
