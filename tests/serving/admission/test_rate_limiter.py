"""Tests a key's limits: reserved by a request's maximum use, settled by its actual use, and never exceeded."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.access.usage import Usage
from serving.admission.errors import RateLimitedError
from serving.admission.rate_limiter import Allowance, Demand, Limit, RateLimiter, Reservation, estimated_tokens
from tests.serving.keyed import principal

NOON = 43_200.0
"""Noon in seconds since midnight. The same number of seconds is left in the day."""


@dataclass
class Clock:
    """A clock that advances only when told to."""

    now: float = 0.0
    limiter: RateLimiter = field(init=False)

    def __post_init__(self) -> None:
        self.limiter = RateLimiter(clock=lambda: self.now, wall=lambda: NOON + self.now)


def asks(tokens_out: int = 1, tokens_in: int = 1, *, bounded: bool = True) -> Demand:
    return Demand(tokens_in, tokens_out, bounded)


def refused(limiter: RateLimiter, of: object, demand: Demand) -> RateLimitedError:
    with pytest.raises(RateLimitedError) as caught:
        limiter.reserve(of, demand)  # type: ignore[arg-type]
    return caught.value


class TestRequests:
    def test_rate_limit_error_includes_the_time_to_wait(self) -> None:
        clock, key = Clock(), principal(requests_per_minute=3)
        for _ in range(3):
            clock.limiter.reserve(key, asks()).settle(1, 1)
        error = refused(clock.limiter, key, asks())
        assert (error.limit, error.retry_after_s) == ("requests_per_minute", 20)
        clock.now = 20
        clock.limiter.reserve(key, asks())

    def test_request_allowance_is_refilled_one_request_at_a_time(self) -> None:
        clock, key = Clock(), principal(requests_per_minute=60)
        for _ in range(60):
            clock.limiter.reserve(key, asks()).settle(1, 1)
        clock.now = 2
        assert clock.limiter.allowances(key)[Limit.REQUESTS_PER_MINUTE] == Allowance(60, 2, 58.0)

    def test_reservation_released_before_its_request_runs_does_not_count_towards_the_limit(self) -> None:
        clock, key = Clock(), principal(requests_per_minute=1, tokens_per_day=10)
        clock.limiter.reserve(key, asks(5)).release()
        clock.limiter.reserve(key, asks(5))

    def test_request_rejected_by_one_limit_does_not_count_towards_other_limits(self) -> None:
        clock, key = Clock(), principal(requests_per_minute=10, tokens_out_per_minute=10)
        clock.limiter.reserve(key, asks(10))
        refused(clock.limiter, key, asks(10))
        assert clock.limiter.allowances(key)[Limit.REQUESTS_PER_MINUTE].remaining == 9


class TestTokens:
    def test_maximum_answer_tokens_are_reserved_when_a_request_starts(self) -> None:
        clock, key = Clock(), principal(tokens_out_per_minute=100)
        clock.limiter.reserve(key, asks(60))
        assert refused(clock.limiter, key, asks(41)).limit == "tokens_out_per_minute"
        clock.limiter.reserve(key, asks(40))

    def test_token_reservation_does_not_expire_while_the_request_runs(self) -> None:
        clock, key = Clock(), principal(tokens_out_per_minute=100)
        clock.limiter.reserve(key, asks(100))
        clock.now = 1000
        assert refused(clock.limiter, key, asks(1)).retry_after_s == 1

    def test_unused_tokens_are_released_immediately(self) -> None:
        clock, key = Clock(), principal(tokens_out_per_minute=100)
        clock.limiter.reserve(key, asks(100)).settle(1, 10)
        assert clock.limiter.allowances(key)[Limit.TOKENS_OUT_PER_MINUTE] == Allowance(100, 90, 6.0)

    def test_next_request_waits_if_a_prompt_was_longer_than_estimated(self) -> None:
        clock, key = Clock(), principal(tokens_in_per_minute=60)
        clock.limiter.reserve(key, asks(tokens_in=10)).settle(100, 1)
        assert refused(clock.limiter, key, asks(tokens_in=20)).retry_after_s == 60

    def test_request_with_a_prompt_estimated_above_the_limit_waits_for_the_full_allowance(self) -> None:
        clock, key = Clock(), principal(tokens_in_per_minute=60)
        clock.limiter.reserve(key, asks(tokens_in=10)).settle(6, 1)
        assert refused(clock.limiter, key, asks(tokens_in=10_000)).retry_after_s == 6
        clock.now = 6
        clock.limiter.reserve(key, asks(tokens_in=10_000))

    def test_error_for_a_request_larger_than_the_limit_has_no_retry_after(self) -> None:
        error = refused(Clock().limiter, principal(tokens_out_per_minute=100), asks(101))
        assert (error.limit, error.retry_after_s) == ("tokens_out_per_minute", None)
        assert "101" in error.wrong

    def test_request_without_max_tokens_is_accepted_only_when_the_full_token_allowance_is_available(self) -> None:
        clock, key = Clock(), principal(tokens_out_per_minute=100)
        clock.limiter.reserve(key, asks(2048, bounded=False)).settle(1, 30)
        assert refused(clock.limiter, key, asks(2048, bounded=False)).retry_after_s == 18
        clock.now = 18
        clock.limiter.reserve(key, asks(2048, bounded=False))


class TestDay:
    def test_daily_limit_resets_at_midnight(self) -> None:
        clock, key = Clock(), principal(tokens_per_day=100)
        clock.limiter.reserve(key, asks(50, 50)).settle(50, 50)
        assert refused(clock.limiter, key, asks()).retry_after_s == NOON
        assert clock.limiter.allowances(key)[Limit.TOKENS_PER_DAY] == Allowance(100, 0, NOON)
        clock.now = NOON
        clock.limiter.reserve(key, asks(50, 50))

    def test_retry_after_is_one_second_if_reservations_of_running_requests_fill_the_limit(self) -> None:
        clock, key = Clock(), principal(tokens_per_day=100)
        clock.limiter.reserve(key, asks(60, 1))
        assert refused(clock.limiter, key, asks(60, 1)).retry_after_s == 1

    def test_request_without_max_tokens_reserves_the_remaining_daily_limit(self) -> None:
        clock, key = Clock(), principal(tokens_per_day=100)
        clock.limiter.reserve(key, asks(50, 49)).settle(49, 50)
        clock.limiter.reserve(key, asks(2048, bounded=False)).settle(1, 20)
        assert refused(clock.limiter, key, asks(2048, bounded=False)).retry_after_s == NOON

    def test_usage_before_the_server_started_counts_towards_the_daily_limit(self) -> None:
        clock, key = Clock(), principal(tokens_per_day=100)
        clock.limiter.reserve(key, asks(10, 1)).settle(1, 10)
        clock.limiter.add_used_today({"k1": 80, "other": 1000})
        assert clock.limiter.allowances(key)[Limit.TOKENS_PER_DAY].remaining == 9


def test_request_is_rejected_when_the_concurrency_limit_is_reached() -> None:
    clock, key = Clock(), principal(concurrent=2)
    held = [clock.limiter.reserve(key, asks()) for _ in range(2)]
    error = refused(clock.limiter, key, asks())
    assert (error.limit, error.retry_after_s) == ("concurrent", 1)
    held[0].settle(5, 5)
    clock.limiter.reserve(key, asks())


def test_error_names_the_exceeded_limit_with_the_longest_wait() -> None:
    clock, key = Clock(), principal(requests_per_minute=1, tokens_out_per_minute=100)
    clock.limiter.reserve(key, asks(10)).settle(1, 10)
    error = refused(clock.limiter, key, asks(100))
    assert (error.limit, error.retry_after_s) == ("requests_per_minute", 60)


def test_usage_by_other_keys_does_not_affect_a_keys_limits() -> None:
    clock = Clock()
    clock.limiter.reserve(principal("a", requests_per_minute=1), asks())
    clock.limiter.reserve(principal("b", requests_per_minute=1), asks())


def test_changed_rate_limit_applies_immediately() -> None:
    clock = Clock()
    clock.limiter.reserve(principal(requests_per_minute=10), asks()).settle(1, 1)
    refused(clock.limiter, principal(requests_per_minute=1), asks())
    clock.limiter.reserve(principal(requests_per_minute=2), asks())


def test_rate_limiter_stores_no_state_for_keys_without_limits() -> None:
    limiter = RateLimiter()
    limiter.reserve(principal(), asks(10**9)).settle(1, 1)
    assert limiter.allowances(principal()) == {}
    assert not limiter._keys


def test_rate_limiter_stores_one_entry_per_key() -> None:
    limiter = RateLimiter()
    for number in range(1000):
        limiter.reserve(principal(f"k{number % 10}", requests_per_minute=10**6), asks()).settle(1, 1)
    assert len(limiter._keys) == 10


def test_prompt_token_estimate_is_positive_and_grows_with_prompt_size_in_bytes() -> None:
    assert (estimated_tokens(0), estimated_tokens(400)) == (1, 101)


STEPS = st.lists(
    st.tuples(st.floats(0, 30), st.integers(1, 120), st.floats(0, 1), st.booleans()), min_size=1, max_size=60
)


@pytest.mark.slow
@settings(max_examples=4 * settings().max_examples, deadline=None)
@given(steps=STEPS, limit=st.integers(1, 100))
def test_token_usage_never_exceeds_the_limit_plus_the_tokens_refilled_since_the_start(
    steps: list[tuple[float, int, float, bool]], limit: int
) -> None:
    clock, key = Clock(), principal(tokens_out_per_minute=limit)
    running: list[tuple[Reservation, int]] = []
    used, since = 0, 0.0
    for pause_s, tokens, share, ends in steps:
        clock.now += pause_s
        with suppress(RateLimitedError):
            running.append((clock.limiter.reserve(key, asks(tokens)), tokens))
        if ends and running:
            reservation, asked = running.pop(0)
            spent = int(asked * share)
            reservation.settle(1, spent)
            used += spent
        held = sum(asked for _, asked in running)
        assert used + held <= limit + (clock.now - since) * limit / 60 + 1e-6


@pytest.mark.slow
@settings(max_examples=4 * settings().max_examples, deadline=None)
@given(amounts=st.lists(st.integers(1, 50), min_size=1, max_size=20), limit=st.integers(50, 200))
def test_request_is_accepted_when_retried_after_the_delay_reported_in_the_error(amounts: list[int], limit: int) -> None:
    clock, key = Clock(), principal(tokens_out_per_minute=limit, requests_per_minute=7)
    for amount in amounts:
        try:
            reservation = clock.limiter.reserve(key, asks(amount))
        except RateLimitedError as error:
            clock.now += error.retry_after_s or 0
            reservation = clock.limiter.reserve(key, asks(amount))
        reservation.settle(1, amount)


EXCHANGE_S = 5.0
DELAY_MIN = 2 * EXCHANGE_S / 60
"""Longest time in minutes until a server knows of usage on another: one interval to write, one to read."""


class Exchange:
    """Several servers that tell each other the usage of one key, as through a store, every few seconds.

    Args:
        phases: for each server, the share of the interval at which it writes and reads.
    """

    def __init__(self, limit: int, phases: Sequence[float]) -> None:
        self.now = 0.0
        self.key = principal(tokens_out_per_minute=limit)
        self.limiters = [RateLimiter({"k1": self.key}.get, clock=lambda: self.now) for _ in phases]
        self._next = [EXCHANGE_S * phase for phase in phases]
        self._unwritten, self._written, self._seen = ([0] * len(phases) for _ in range(3))

    def forward(self, seconds: float) -> None:
        """Advance the clock. Servers write and read when their time comes."""
        until = self.now + seconds
        while min(self._next) <= until:
            number = self._next.index(min(self._next))
            self.now = self._next[number]
            self._next[number] += EXCHANGE_S
            self._written[number] += self._unwritten[number]
            self._unwritten[number] = 0
            others = sum(self._written) - self._written[number]
            used = Usage(0, 0, others - self._seen[number])
            self._seen[number] = others
            self.limiters[number].add_used_elsewhere({"k1": used}, len(self.limiters))
        self.now = until

    def ask(self, number: int, tokens: int) -> int:
        """Make a request on a server that ends immediately, and return the number of tokens that it used."""
        with suppress(RateLimitedError):
            self.limiters[number].reserve(self.key, asks(tokens)).settle(1, tokens)
            self._unwritten[number] += tokens
            return tokens
        return 0


@pytest.mark.slow
@settings(max_examples=4 * settings().max_examples, deadline=None)
@given(
    limit=st.integers(10, 100),
    phases=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    steps=st.lists(
        st.tuples(st.one_of(st.floats(0, 6), st.floats(0, 90)), st.sampled_from([0.1, 0.5, 1.0]), st.booleans()),
        min_size=1,
        max_size=30,
    ),
)
def test_all_servers_together_use_at_most_slightly_more_than_the_refill_plus_one_allowance_per_server(
    limit: int, phases: list[float], steps: list[tuple[float, float, bool]]
) -> None:
    servers, used = Exchange(limit, phases), list[tuple[float, int]]()
    for pause_s, share, all_servers in steps:
        servers.forward(pause_s)
        for number in range(len(phases)) if all_servers else [0]:
            amount = max(1, int(limit * share))
            while tokens := servers.ask(number, amount):
                used.append((servers.now, tokens))
            used.append((servers.now, servers.ask(number, 1)))
    count = len(phases)
    for start, (since, _) in enumerate(used):
        total = 0
        for at, tokens in used[start:]:
            total += tokens
            assert total <= limit * ((at - since) / 60 + count + (count - 1) * DELAY_MIN) + 1e-6


def test_usage_on_other_servers_delays_requests_until_it_has_expired() -> None:
    clock, key = Clock(), principal(tokens_out_per_minute=60, requests_per_minute=6)
    clock.limiter = RateLimiter({"k1": key}.get, clock=lambda: clock.now)
    clock.limiter.add_used_elsewhere({"k1": Usage(2, 1, 90)}, 2)
    assert clock.limiter.allowances(key) == {
        Limit.REQUESTS_PER_MINUTE: Allowance(6, 4, 20.0),
        Limit.TOKENS_OUT_PER_MINUTE: Allowance(60, 0, 90.0),
    }
    assert refused(clock.limiter, key, asks(1)).retry_after_s == 31


def test_usage_on_other_servers_expires_even_if_the_key_sends_no_request_to_this_server() -> None:
    clock, key = Clock(), principal(tokens_out_per_minute=60)
    clock.limiter = RateLimiter({"k1": key}.get, clock=lambda: clock.now)
    for _ in range(10):
        clock.limiter.add_used_elsewhere({"k1": Usage(1, 1, 60)}, 2)
        clock.now += 60
    assert clock.limiter.allowances(key)[Limit.TOKENS_OUT_PER_MINUTE].remaining == 60


def test_wait_caused_by_usage_on_other_servers_is_capped_at_72_seconds_per_server() -> None:
    clock, key = Clock(), principal(tokens_out_per_minute=60)
    clock.limiter = RateLimiter({"k1": key}.get, clock=lambda: clock.now)
    clock.limiter.add_used_elsewhere({"k1": Usage(1, 1, 10**6)}, 3)
    assert clock.limiter.allowances(key)[Limit.TOKENS_OUT_PER_MINUTE].reset_s == pytest.approx(3 * 1.2 * 60)


def test_usage_reported_by_other_servers_is_not_stored_for_keys_without_limits() -> None:
    limiter = RateLimiter({"k1": principal()}.get)
    limiter.add_used_elsewhere({"k1": Usage(1, 1, 1), "unknown": Usage(1, 1, 1)}, 2)
    assert not limiter._keys
