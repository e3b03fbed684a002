"""Tests a key's limits on several servers that share a store in PostgreSQL, with a simulated clock."""

from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy.exc import OperationalError

from serving.access import usage_meter
from serving.access.usage_meter import UsageMeter
from serving.admission.errors import RateLimitedError
from serving.admission.rate_limiter import Demand, Limit, RateLimiter
from serving.telemetry.usage_writer import UsageWriter
from svc.identity.principal import Principal
from tests.serving.keyed import principal

NOON = datetime(2026, 3, 4, 12, tzinfo=UTC)
KEY = principal(
    "k1", requests_per_minute=60, tokens_in_per_minute=600, tokens_out_per_minute=1200, tokens_per_day=10**6
)
EXCHANGE_S = 5


@dataclass
class Clock:
    """A clock that the servers share, and that stands still until it is advanced."""

    at: datetime = NOON

    def now(self) -> datetime:
        """Return the current time."""
        return self.at

    def seconds(self) -> float:
        """Return the current time in seconds."""
        return self.at.timestamp()

    def forward(self, seconds: float) -> None:
        """Advance the clock."""
        self.at += timedelta(seconds=seconds)


@dataclass
class Server:
    """The part of a server that enforces the limits of keys."""

    store: Store
    clock: Clock
    key: Principal = KEY
    limiter: RateLimiter = field(init=False)
    meter: UsageMeter = field(init=False)
    writer: UsageWriter = field(init=False)

    def __post_init__(self) -> None:
        self.limiter = RateLimiter({self.key.key_id: self.key}.get, clock=self.clock.seconds, wall=self.clock.seconds)
        self.meter = UsageMeter(self.store, now=self.clock.now)
        self.writer = UsageWriter(
            self.store, self.meter, self.limiter.add_used_today, self.limiter.add_used_elsewhere, now=self.clock.now
        )

    def ask(self, tokens_in: int = 10, tokens_out: int = 20) -> bool:
        """Let the key make a request that ends immediately, and return whether it was accepted."""
        with suppress(RateLimitedError):
            self.limiter.reserve(self.key, Demand(tokens_in, tokens_out, bounded=True)).settle(tokens_in, tokens_out)
            self.meter.add(self.key.key_id, "tuned", tokens_in=tokens_in, tokens_out=tokens_out)
            return True
        return False

    def ask_all(self) -> int:
        """Make requests until one is refused, and return the number of accepted ones."""
        count = 0
        while self.ask():
            count += 1
        return count

    def remaining(self, limit: Limit) -> int:
        """Return the remaining amount of a limit."""
        return self.limiter.allowances(self.key)[limit].remaining


Two = tuple[Clock, Server, Server]


@pytest.fixture
async def two(postgresql_store: Store) -> Two:
    """Return two servers that have read the store once."""
    clock = Clock()
    first, second = Server(postgresql_store, clock), Server(postgresql_store, clock)
    await exchange(first, second)
    return clock, first, second


async def exchange(*servers: Server) -> None:
    for server in servers:
        await server.writer.exchange()


async def test_request_on_one_server_counts_towards_every_limit_on_the_other(two: Two) -> None:
    _, first, second = two
    for _ in range(5):
        first.ask(10, 20)
    await exchange(first, second)
    assert first.limiter.allowances(KEY) == second.limiter.allowances(KEY)
    assert [second.remaining(limit) for limit in Limit if limit is not Limit.CONCURRENT] == [55, 550, 1100, 999_850]


async def test_requests_on_this_server_are_counted_once_however_often_the_store_is_read(two: Two) -> None:
    _, first, second = two
    first.ask()
    second.ask()
    for _ in range(3):
        await exchange(first, second)
    assert [server.remaining(Limit.REQUESTS_PER_MINUTE) for server in (first, second)] == [58, 58]


@pytest.mark.slow
async def test_two_servers_together_exceed_a_shared_limit_by_at_most_one_burst_each(two: Two) -> None:
    clock, first, second = two
    accepted, minutes = 0, 10
    for second_of_time in range(minutes * 60):
        if second_of_time % EXCHANGE_S == 0:
            await exchange(first)
        if second_of_time % EXCHANGE_S == 2:
            await exchange(second)
        accepted += first.ask_all() + second.ask_all()
        clock.forward(1)
    print(f"accepted {accepted} requests in {minutes} minutes with a limit of 60 per minute")  # for `pytest -rP`
    assert 60 * (minutes - 1) < accepted <= 60 * (minutes + 2 * 1.2)


async def test_usage_before_midnight_does_not_count_towards_the_new_day(two: Two) -> None:
    clock, first, second = two
    clock.at = NOON.replace(hour=23, minute=59, second=58)
    first.ask(10, 20)
    clock.forward(4)
    second.ask(1, 1)
    await exchange(first, second)
    assert second.remaining(Limit.TOKENS_PER_DAY) == 10**6 - 2


async def test_usage_just_before_midnight_counts_towards_the_per_minute_limit_after_midnight(two: Two) -> None:
    clock, first, second = two
    clock.at = NOON.replace(hour=23, minute=59, second=58)
    first.ask_all()
    clock.forward(4)
    await exchange(second, first, second)  # the other one writes after this one has seen the new day
    assert second.remaining(Limit.REQUESTS_PER_MINUTE) == 0


async def test_usage_before_and_after_an_hour_boundary_is_not_counted_twice(two: Two) -> None:
    clock, first, second = two
    clock.at = NOON.replace(minute=59, second=58)
    first.ask()
    await exchange(first, second)
    clock.forward(4)
    first.ask()
    await exchange(first, second)
    assert second.remaining(Limit.TOKENS_PER_DAY) == 10**6 - 60


async def test_usage_before_a_restart_counts_once_and_only_towards_the_daily_limit(two: Two) -> None:
    clock, first, second = two
    first.ask(10, 20)
    await exchange(first, second)
    restarted = Server(first.store, clock)
    await exchange(restarted, restarted)
    assert restarted.remaining(Limit.TOKENS_PER_DAY) == 10**6 - 30
    assert restarted.remaining(Limit.REQUESTS_PER_MINUTE) == 60


async def test_usage_without_a_key_or_with_an_unknown_key_is_ignored(two: Two) -> None:
    _, first, second = two
    first.meter.add("gone", "tuned", tokens_in=10, tokens_out=10)
    first.meter.add(None, "tuned", tokens_in=10, tokens_out=10)
    await exchange(first, second)
    assert [allowance.remaining for allowance in second.limiter.allowances(KEY).values()] == [60, 600, 1200, 10**6]


def _failing(*_: object) -> None:
    raise OperationalError("INSERT", {}, Exception("no route to host"))


@pytest.mark.slow
async def test_usage_during_an_outage_is_added_afterwards_without_a_long_lockout(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, first, second = two
    used = 0
    with monkeypatch.context() as away:
        away.setattr(usage_meter, "add_usage", _failing)
        for _ in range(60):
            used += first.ask_all() + second.ask_all()
            clock.forward(60)
            for server in (first, second):
                with pytest.raises(OperationalError):
                    await exchange(server)
    await exchange(first, second, first)
    assert [server.remaining(Limit.TOKENS_PER_DAY) for server in (first, second)] == [10**6 - 30 * used] * 2
    clock.forward(2 * 1.2 * 60)
    assert first.ask() and second.ask()


async def test_remaining_rate_limit_is_unchanged_while_the_usage_on_other_servers_cannot_be_read(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first, second = two
    first.ask()
    await exchange(first)
    with monkeypatch.context() as away:
        away.setattr("serving.access.used_elsewhere.usage_by_day", _failing)
        with pytest.raises(OperationalError):
            await exchange(second)
        assert second.remaining(Limit.REQUESTS_PER_MINUTE) == 60
    await exchange(second)
    assert second.remaining(Limit.REQUESTS_PER_MINUTE) == 59
