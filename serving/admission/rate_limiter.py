"""Enforces the limits on API keys: requests and tokens per minute, tokens per day, and concurrent requests.

A request reserves its maximum use before it waits for anything. When it ends, the reservation is replaced by its actual
use. A request rejected because of a client error counts as a request, while a request rejected because no slot is free
costs nothing. The state is kept in memory only, with one entry per key in use. Keys come from the store, so clients
cannot add entries. When the server starts, it adds the usage from earlier that day.

If several servers share a store, each learns of the other servers' usage after a short delay, and adds it
(`serving.telemetry.usage_writer`). Within t minutes, N servers then allow a key at most its limit x (t + N + d (N -
1)), where d is the delay in minutes until a server learns of another server's usage. Proof: the last server to admit a
request has counted all usage except what the N - 1 other servers have used within the last d minutes, so the counted
usage is at most limit x (t + 1). Each of these servers can use at most limit x (1 + d) within d minutes. With d = 10 s,
the total is less than limit x (t + 1.2 N).

A prompt's token count is known only after the engine has counted it. Until then, it is estimated from
the request's size: text in most languages has three to five bytes per token, and a request has more
bytes because of its JSON. An estimate that is too low is corrected at the end of the request and delays
later requests.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from serving.access.usage import Usage
from serving.admission.errors import RateLimitedError
from svc.identity.principal import Limits, Principal

_BYTES_PER_TOKEN = 4
_DAY_S = 86_400
_UNTIL_ONE_ENDS_S = 1.0
"""Retry delay in seconds when a running request must complete first. The request's remaining time is not known."""
_ROUNDING = 1e-9
_NONE = Limits()
_DEBT_PER_SERVER = 1.2
"""Adding usage on other servers can raise a key's recorded use to at most 1.2 times its per-minute limit for each
running server: with two servers, to 2.4 times the limit. This maximum is reached only after a store outage, when all
usage during the outage is added in one step."""


class Limit(StrEnum):
    """The kinds of limits on a key, named after the fields in `svc.identity.principal.Limits`."""

    REQUESTS_PER_MINUTE = "requests_per_minute"
    TOKENS_IN_PER_MINUTE = "tokens_in_per_minute"
    TOKENS_OUT_PER_MINUTE = "tokens_out_per_minute"
    CONCURRENT = "concurrent"
    TOKENS_PER_DAY = "tokens_per_day"


_NAMED = {limit: limit.value.replace("_", " ") for limit in Limit} | {Limit.CONCURRENT: "concurrent requests"}


class Demand(NamedTuple):
    """Upper bounds on a request's token usage, which counts toward the limits of its key.

    Attributes:
        tokens_in: estimated number of tokens in the prompt; see `estimated_tokens`.
        tokens_out: maximum number of tokens in all answers together.
        bounded: whether the client limited the answer length. If it did not, the number of tokens reserved for the
            longest possible answers is capped at the per-minute limit, and at what is left of the daily limit.
            Without this cap, such a request might never be admitted.
    """

    tokens_in: int
    tokens_out: int
    bounded: bool


_NO_DEMAND = Demand(0, 0, bounded=False)


class Allowance(NamedTuple):
    """How much is left of one of a key's limits.

    Attributes:
        reset_s: seconds until the whole limit is available again.
    """

    limit: int
    remaining: int
    reset_s: float


def estimated_tokens(size: int) -> int:
    """Estimate the number of prompt tokens in a request whose body is `size` bytes long."""
    return size // _BYTES_PER_TOKEN + 1


class Reservation:
    """The share of a key's limits that one request holds until it ends. A reservation must be settled or released
    exactly once.

    Args:
        held: for each limit, its quota, the reserved amount and the amount that was free before the
            reservation.
    """

    __slots__ = ("_held",)

    def __init__(self, held: Sequence[tuple["_Quota", int, float]]) -> None:
        self._held = held

    def __add__(self, other: "Reservation") -> "Reservation":
        return Reservation([*self._held, *other._held])

    def allowances(self) -> dict[Limit, Allowance]:
        """Return the remaining amount of each limit after this reservation. This is cheaper than
        `RateLimiter.allowances`.
        """
        return {
            quota.limit: Allowance(quota.most, max(0, int(free) - amount), quota.reset_s())
            for quota, amount, free in self._held
        }

    def settle(self, tokens_in: int, tokens_out: int) -> None:
        """Replace the reservation with the request's actual use."""
        used = Usage(1, tokens_in, tokens_out)
        for quota, amount, _ in self._held:
            quota.reserved -= amount
            quota.used += quota.spent(used)

    def release(self) -> None:
        """Release the whole reservation without counting the request."""
        for quota, amount, _ in self._held:
            quota.reserved -= amount


class RateLimiter:
    """Enforces the limits of all API keys.

    Args:
        principal_of: function that returns a key's principal, given the key's id. It is called for keys whose usage
            other servers report.
        clock: function that returns monotonic time, in seconds.
        wall: function that returns wall-clock time, in seconds since 1970.
    """

    def __init__(
        self,
        principal_of: Callable[[str], Principal | None] = lambda key_id: None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._principal_of = principal_of
        self._clock = clock
        self._wall = wall
        self._keys: dict[str, Mapping[Limit, _Quota]] = {}

    def reserve_request(self, principal: Principal) -> Reservation:
        """Count a request against its key's per-minute request limit, before the request is examined.

        Raises:
            RateLimitedError: the key has no requests left in this minute.
        """
        quotas = self._quotas(principal)
        return _reserve([each for each in quotas if each.limit is Limit.REQUESTS_PER_MINUTE], _NO_DEMAND)

    def reserve(self, principal: Principal, demand: Demand, begun: Reservation | None = None) -> Reservation:
        """Reserve the maximum amount that a request may use.

        Args:
            begun: the reservation from `reserve_request`.

        Returns:
            A reservation that includes `begun`.

        Raises:
            RateLimitedError: not enough of a limit is left. If several limits are exceeded, the error names the
                one with the longest wait.
        """
        quotas = self._quotas(principal)
        if begun is None:
            return _reserve(quotas, demand)
        return begun + _reserve([each for each in quotas if each.limit is not Limit.REQUESTS_PER_MINUTE], demand)

    def allowances(self, principal: Principal) -> dict[Limit, Allowance]:
        """Return the remaining amount of each of a key's limits."""
        return Reservation([(quota, 0, quota.free()) for quota in self._quotas(principal)]).allowances()

    def add_used_today(self, tokens: Mapping[str, int]) -> None:
        """Add the tokens (input plus output) used today by each key on other servers or before this server started."""
        for key_id, used in tokens.items():
            quota = self._of_key(key_id)[Limit.TOKENS_PER_DAY]
            quota.forget()
            quota.used += used

    def add_used_elsewhere(self, used: Mapping[str, Usage], servers: int) -> None:
        """Charge each key's per-minute limits for its usage on other servers since the last call.

        Args:
            servers: number of running servers.
        """
        for key_id, usage in used.items():
            principal = self._principal_of(key_id)
            for quota in self._quotas(principal) if principal else ():
                if isinstance(quota, _OfMinute):
                    quota.add_used_elsewhere(usage, servers)

    def _quotas(self, principal: Principal) -> list["_Quota"]:
        """Return the quotas for a key's limits, after updating them with the operator's latest changes."""
        if principal.limits == _NONE:
            return []
        held = []
        for quota in self._of_key(principal.key_id).values():
            most: int | None = getattr(principal.limits, quota.limit)
            if most is not None:
                quota.most = most
                held.append(quota)
        return held

    def _of_key(self, key_id: str) -> Mapping[Limit, "_Quota"]:
        if key_id not in self._keys:
            quotas = (
                _Requests(Limit.REQUESTS_PER_MINUTE, self._clock),
                _TokensIn(Limit.TOKENS_IN_PER_MINUTE, self._clock),
                _TokensOut(Limit.TOKENS_OUT_PER_MINUTE, self._clock),
                _Quota(Limit.CONCURRENT, self._clock),
                _TokensOfDay(Limit.TOKENS_PER_DAY, self._wall),
            )
            self._keys[key_id] = {quota.limit: quota for quota in quotas}
        return self._keys[key_id]


def _reserve(quotas: Sequence["_Quota"], demand: Demand) -> Reservation:
    held, longest, refused = [], 0.0, None
    for quota in quotas:
        free, amount = quota.free(), quota.demanded(demand)
        if amount > free and (wait_s := quota.wait_s(amount)) > longest:
            longest, refused = wait_s, quota
        held.append((quota, amount, free))
    if refused:
        raise RateLimitedError(
            f"this key has reached its limit of {refused.most} {_NAMED[refused.limit]}",
            todo="retry the request later",
            limit=refused.limit.value,
            retry_after_s=max(1, math.ceil(longest)),
        )
    for quota, amount, _ in held:
        quota.reserved += amount
    return Reservation(held)


class _Quota:
    """Tracks how much of one limit a key has used.

    This base class counts concurrent requests, so a finished request no longer uses any of the limit. A request's
    maximum use stays reserved while it runs: unlike past use, reservations do not expire with time. The sum of a
    key's reservations and past use therefore never exceeds the limit.

    Args:
        clock: function that returns the time, in seconds.

    Attributes:
        most: the maximum amount that may be used and reserved.
        used: past usage that had not expired at the last call to `forget`.
        reserved: amount reserved by requests that are not settled yet.
    """

    def __init__(self, limit: Limit, clock: Callable[[], float]) -> None:
        self.limit = limit
        self.most = self.reserved = 0
        self.used = self._at = 0.0
        self._clock = clock

    def demanded(self, demand: Demand) -> int:
        """Return the amount of this limit that a request must reserve."""
        return 1

    def spent(self, used: Usage) -> int:
        """Return the amount of this limit that a request has used. It may exceed the reservation if that was an
        estimate.
        """
        return 0

    def forget(self) -> None:
        """Update `used`, so that it no longer includes usage that has expired."""

    def reset_s(self) -> float:
        """Return the number of seconds until all usage so far has stopped counting toward the limit.

        Reservations are ignored, because it is not known when they end.
        """
        return 0.0

    def free(self) -> float:
        """Return the amount that can be reserved, plus a rounding tolerance. Negative if the limit is exceeded."""
        self.forget()
        return self.most - self.used - self.reserved + _ROUNDING * self.most

    def wait_s(self, amount: int) -> float:
        """Return the number of seconds until `amount` can be reserved, given that it cannot be reserved now."""
        missing = self.used + self.reserved + amount - self.most
        return _UNTIL_ONE_ENDS_S if missing > self.used + _ROUNDING * self.most else self._until_free_s(missing)

    def _until_free_s(self, missing: float) -> float:
        return self.reset_s()


class _OfMinute(_Quota):
    """A limit per minute. Past usage declines continuously, by the amount of the limit per minute, down to 0."""

    def forget(self) -> None:
        now = self._clock()
        self.used = max(0.0, self.used - (now - self._at) * self.most / 60)
        self._at = now

    def add_used_elsewhere(self, used: Usage, servers: int) -> None:
        """Add usage on other servers. This can raise `used` to at most `_DEBT_PER_SERVER` times the limit, times the
        number of running servers.
        """
        self.forget()
        self.used = max(self.used, min(self.used + self.spent(used), _DEBT_PER_SERVER * servers * self.most))

    def reset_s(self) -> float:
        return self._until_free_s(self.used)

    def _until_free_s(self, missing: float) -> float:
        return missing * 60 / self.most


class _Requests(_OfMinute):
    def spent(self, used: Usage) -> int:
        return used.requests


class _TokensIn(_OfMinute):
    def demanded(self, demand: Demand) -> int:
        return min(demand.tokens_in, self.most)

    def spent(self, used: Usage) -> int:
        return used.tokens_in


class _TokensOut(_OfMinute):
    def demanded(self, demand: Demand) -> int:
        """Return the maximum number of answer tokens: the client's if it set one, otherwise the lower of the model's
        maximum and the key's limit.

        Raises:
            RateLimitedError: the maximum that the client set, for all answers together, exceeds the key's limit.
        """
        if demand.bounded and demand.tokens_out > self.most:
            raise RateLimitedError(
                f"the answers to this request could reach {demand.tokens_out} tokens, more than this key's limit of "
                f"{self.most} {_NAMED[self.limit]}",
                todo="reduce 'n' or 'max_tokens'",
                limit=self.limit.value,
                retry_after_s=None,
            )
        return min(demand.tokens_out, self.most)

    def spent(self, used: Usage) -> int:
        return used.tokens_out


class _TokensOfDay(_Quota):
    """A limit on the tokens per UTC day. Its clock must return seconds since 1970."""

    def demanded(self, demand: Demand) -> int:
        tokens = demand.tokens_in + demand.tokens_out
        return tokens if demand.bounded else max(1, min(tokens, int(self.most - self.used)))

    def spent(self, used: Usage) -> int:
        return used.tokens_in + used.tokens_out

    def forget(self) -> None:
        now = self._clock()
        if now // _DAY_S != self._at // _DAY_S:
            self.used = 0.0
        self._at = now

    def reset_s(self) -> float:
        return _DAY_S - self._clock() % _DAY_S
