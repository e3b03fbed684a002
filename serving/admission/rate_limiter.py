"""Holds keys to their limits: requests and tokens a minute, tokens a day, requests at once.

A request reserves what it may use before it waits for anything, and settles for what it used when it has ended. One
that is refused by its client's fault counts as a request; one for which there is no place costs nothing. In memory
alone, with one entry for each key that asked; keys come from the store, and no client can make one. What was used today
is told at the start of a server.

The tokens of a prompt are known once the engine has counted them. Until then they are estimated from the bytes of the
request: text in most languages has three to five bytes a token, and a request more for its JSON. An estimate that is
too low is corrected when the request ends, and keeps the next one waiting.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from serving.admission.errors import RateLimitedError
from serving.admission.quotas import DayQuota, MinuteQuota, Quota, RunningQuota
from svc.principal import Limits, Principal

_BYTES_PER_TOKEN = 4
_NONE = Limits()


class Limit(StrEnum):
    """One limit of a key; the name is that of the field of `svc.principal.Limits`."""

    REQUESTS_PER_MINUTE = "requests_per_minute"
    TOKENS_IN_PER_MINUTE = "tokens_in_per_minute"
    TOKENS_OUT_PER_MINUTE = "tokens_out_per_minute"
    CONCURRENT = "concurrent"
    TOKENS_PER_DAY = "tokens_per_day"


_NAMED = {limit: limit.value.replace("_", " ") for limit in Limit} | {Limit.CONCURRENT: "requests at once"}


class Demand(NamedTuple):
    """What a request may use.

    Attributes:
        tokens_in: an estimate, see `estimated_tokens`.
        tokens_out: most that all of its answers may have.
        said: the client said how long an answer may be. Where it did not, the longest that the model can give counts,
            but never more than there is of a limit: whoever says nothing waits for the whole limit, and is not refused.
    """

    tokens_in: int
    tokens_out: int
    said: bool


_NO_DEMAND = Demand(0, 0, said=False)
_OF_A_REQUEST = frozenset({Limit.REQUESTS_PER_MINUTE})


class Allowance(NamedTuple):
    """What is left of a limit.

    Attributes:
        reset_s: until it is whole again, seconds.
    """

    limit: int
    remaining: int
    reset_s: float


def estimated_tokens(size: int) -> int:
    """About how many tokens the prompt of a request has.

    Args:
        size: bytes of its body.
    """
    return size // _BYTES_PER_TOKEN + 1


class Reservation:
    """What a request holds of its key's limits until it ends; to be settled once."""

    __slots__ = ("_held",)

    def __init__(self, held: Sequence["_Held"]) -> None:
        self._held = held

    def __add__(self, other: "Reservation") -> "Reservation":
        """Both together."""
        return Reservation([*self._held, *other._held])

    def allowances(self) -> dict[Limit, Allowance]:
        """What was left of each limit beside it; cheaper than to ask the limiter anew."""
        found = {}
        for key_limit, amount, free, at in self._held:
            left = int(free) - amount
            found[key_limit.limit] = Allowance(
                key_limit.most, left if left > 0 else 0, key_limit.quota.reset_s(at, key_limit.most)
            )
        return found

    def settle(self, tokens_in: int, tokens_out: int) -> None:
        """The request has ended and used so much."""
        for key_limit, amount, _, _ in self._held:
            used = key_limit.a_request + key_limit.a_token_in * tokens_in + key_limit.a_token_out * tokens_out
            key_limit.quota.settle(amount, used)

    def release(self) -> None:
        """Give everything back: the request failed, and not by its client's fault."""
        for key_limit, amount, _, _ in self._held:
            key_limit.quota.settle(amount, 0)


class RateLimiter:
    """The limits of all keys.

    Args:
        clock: monotonic time, seconds.
        wall: seconds since 1970.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._wall = wall
        self._keys: dict[str, _KeyQuotas] = {}

    def reserve_request(self, principal: Principal) -> Reservation:
        """Take a request of those that a key may send in a minute, before anything else is known of it.

        Raises:
            RateLimitedError: the key has none left.
        """
        limits = self._limits(principal)
        return self._reserved(principal, _NO_DEMAND, [each for each in limits if each.limit in _OF_A_REQUEST])

    def reserve(self, principal: Principal, demand: Demand, begun: Reservation | None = None) -> Reservation:
        """Take what a request may use.

        Args:
            begun: what `reserve_request` has taken for it.

        Returns:
            Both together.

        Raises:
            RateLimitedError: there is not so much left of a limit; of several the one that takes longest is named.
        """
        limits = self._limits(principal)
        if begun is None:
            return self._reserved(principal, demand, limits)
        return begun + self._reserved(principal, demand, [each for each in limits if each.limit not in _OF_A_REQUEST])

    def _reserved(self, principal: Principal, demand: Demand, limits: Sequence["_KeyLimit"]) -> Reservation:
        held, longest, refused = list[_Held](), 0.0, None
        now, wall = self._clock(), self._wall()
        for key_limit in limits:
            at = wall if key_limit.by_day else now
            free = key_limit.quota.free(at, key_limit.most)
            amount = key_limit.reserves(demand, key_limit) if key_limit.reserves else 1
            if amount > free and (wait_s := key_limit.quota.wait_s(amount, at, key_limit.most)) > longest:
                longest, refused = wait_s, key_limit.limit
            held.append((key_limit, amount, free, at))
        if refused:
            raise self._refusal(refused, principal, longest)
        for key_limit, amount, _, _ in held:
            key_limit.quota.reserved += amount
        return Reservation(held)

    def allowances(self, principal: Principal) -> dict[Limit, Allowance]:
        """What is left of each limit that a key has."""
        now, wall = self._clock(), self._wall()
        times = [(key_limit, wall if key_limit.by_day else now) for key_limit in self._limits(principal)]
        return Reservation(
            [(key_limit, 0, key_limit.quota.free(at, key_limit.most), at) for key_limit, at in times]
        ).allowances()

    def add_used_today(self, tokens: Mapping[str, int]) -> None:
        """Adds what keys used today before this server started, in and out together."""
        for key_id, used in tokens.items():
            quota = self._keys.setdefault(key_id, _KeyQuotas()).quotas[Limit.TOKENS_PER_DAY]
            quota.free(self._wall(), used)
            quota.settle(0, used)

    def _limits(self, principal: Principal) -> Sequence["_KeyLimit"]:
        """Of each limit that a key has."""
        key = self._keys.get(principal.key_id)
        if key is None:
            if principal.limits == _NONE:
                return ()
            key = self._keys[principal.key_id] = _KeyQuotas()
        return key.held(principal.limits)

    def _refusal(self, limit: Limit, principal: Principal, wait_s: float) -> RateLimitedError:
        most: int = getattr(principal.limits, limit)
        return RateLimitedError(
            f"the limit of this key is reached: {most} {_NAMED[limit]}",
            todo="send the request again later",
            limit=limit.value,
            retry_after_s=max(1, math.ceil(wait_s)),
        )


@dataclass(frozen=True, slots=True)
class _KeyLimit:
    """What a key may take of one limit, and has taken.

    Attributes:
        by_day: its quota goes by the time of day.
        reserves: what a request reserves of it; None where that is one.
        a_request, a_token_in, a_token_out: what each of them has used of it in the end.
    """

    limit: Limit
    most: int
    quota: Quota
    by_day: bool
    reserves: "_Reserves | None"
    a_request: int
    a_token_in: int
    a_token_out: int


_Held = tuple[_KeyLimit, int, float, float]
"""Of a limit: what is reserved of it, what was free before, and when, in the quota's own clock."""


class _KeyQuotas:
    """What is taken of the limits of one key."""

    def __init__(self) -> None:
        self.quotas: Mapping[Limit, Quota] = {
            Limit.REQUESTS_PER_MINUTE: MinuteQuota(),
            Limit.TOKENS_IN_PER_MINUTE: MinuteQuota(),
            Limit.TOKENS_OUT_PER_MINUTE: MinuteQuota(),
            Limit.CONCURRENT: RunningQuota(),
            Limit.TOKENS_PER_DAY: DayQuota(),
        }
        self._limits = _NONE
        self._held: Sequence[_KeyLimit] = ()

    def held(self, limits: Limits) -> Sequence[_KeyLimit]:
        """Of those that there are; they change when the operator changes them."""
        if limits is not self._limits:
            self._limits = limits
            self._held = tuple(
                _KeyLimit(limit, most, quota, limit is Limit.TOKENS_PER_DAY, _RESERVES.get(limit), *_USED[limit])
                for limit, quota in self.quotas.items()
                if (most := getattr(limits, limit)) is not None
            )
        return self._held


def _tokens_in(demand: Demand, key_limit: _KeyLimit) -> int:
    return min(demand.tokens_in, key_limit.most)


def _tokens_out(demand: Demand, key_limit: _KeyLimit) -> int:
    """Where the client says nothing, as much as there may be.

    Raises:
        RateLimitedError: the client asks for more than there ever is.
    """
    if not demand.said:
        return min(demand.tokens_out, key_limit.most)
    if demand.tokens_out > key_limit.most:
        raise RateLimitedError(
            f"the answers may take {demand.tokens_out} tokens, more than the limit of this key: {key_limit.most} "
            f"{_NAMED[Limit.TOKENS_OUT_PER_MINUTE]}",
            todo="send a smaller 'n' or 'max_tokens'",
            limit=Limit.TOKENS_OUT_PER_MINUTE.value,
            retry_after_s=None,
        )
    return demand.tokens_out


def _tokens_of_day(demand: Demand, key_limit: _KeyLimit) -> int:
    asked = demand.tokens_in + demand.tokens_out
    return asked if demand.said else max(1, min(asked, key_limit.quota.unused(key_limit.most)))


_Reserves = Callable[[Demand, _KeyLimit], int]
_RESERVES: Mapping[Limit, _Reserves] = {
    Limit.TOKENS_IN_PER_MINUTE: _tokens_in,
    Limit.TOKENS_OUT_PER_MINUTE: _tokens_out,
    Limit.TOKENS_PER_DAY: _tokens_of_day,
}
"""What a request reserves of a limit; of others it is one."""
_USED: Mapping[Limit, tuple[int, int, int]] = {
    Limit.REQUESTS_PER_MINUTE: (1, 0, 0),
    Limit.TOKENS_IN_PER_MINUTE: (0, 1, 0),
    Limit.TOKENS_OUT_PER_MINUTE: (0, 0, 1),
    Limit.CONCURRENT: (0, 0, 0),
    Limit.TOKENS_PER_DAY: (0, 1, 1),
}
"""What a request has used of a limit in the end: itself, each of its tokens in, each of them out."""
