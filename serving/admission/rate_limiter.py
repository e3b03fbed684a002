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
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from serving.admission.errors import RateLimitedError
from svc.identity.principal import Limits, Principal

_BYTES_PER_TOKEN = 4
_DAY_S = 86_400
_UNTIL_ONE_ENDS_S = 1.0
"""Waited where room comes only with the end of a request, which nobody knows."""
_ROUNDING = 1e-9
_NONE = Limits()


class Limit(StrEnum):
    """One limit of a key; the name is that of the field of `svc.identity.principal.Limits`."""

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
    """What a request holds of its key's limits until it ends; to be settled once.

    Args:
        held: of each limit what is reserved, and what was free before.
    """

    __slots__ = ("_held",)

    def __init__(self, held: Sequence[tuple["_Quota", int, float]]) -> None:
        self._held = held

    def __add__(self, other: "Reservation") -> "Reservation":
        """Both together."""
        return Reservation([*self._held, *other._held])

    def allowances(self) -> dict[Limit, Allowance]:
        """What was left of each limit beside it; cheaper than to ask the limiter anew."""
        return {
            quota.limit: Allowance(quota.most, max(0, int(free) - amount), quota.reset_s())
            for quota, amount, free in self._held
        }

    def settle(self, tokens_in: int, tokens_out: int) -> None:
        """The request has ended and used so much."""
        for quota, amount, _ in self._held:
            quota.reserved -= amount
            quota.used += quota.spent(tokens_in, tokens_out)

    def release(self) -> None:
        """Give everything back: the request failed, and not by its client's fault."""
        for quota, amount, _ in self._held:
            quota.reserved -= amount


class RateLimiter:
    """The limits of all keys.

    Args:
        clock: monotonic time, seconds.
        wall: seconds since 1970.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._wall = wall
        self._keys: dict[str, Mapping[Limit, _Quota]] = {}

    def reserve_request(self, principal: Principal) -> Reservation:
        """Take a request of those that a key may send in a minute, before anything else is known of it.

        Raises:
            RateLimitedError: the key has none left.
        """
        quotas = self._quotas(principal)
        return _reserve([each for each in quotas if each.limit is Limit.REQUESTS_PER_MINUTE], _NO_DEMAND)

    def reserve(self, principal: Principal, demand: Demand, begun: Reservation | None = None) -> Reservation:
        """Take what a request may use.

        Args:
            begun: what `reserve_request` has taken for it.

        Returns:
            Both together.

        Raises:
            RateLimitedError: there is not so much left of a limit; of several the one that takes longest is named.
        """
        quotas = self._quotas(principal)
        if begun is None:
            return _reserve(quotas, demand)
        return begun + _reserve([each for each in quotas if each.limit is not Limit.REQUESTS_PER_MINUTE], demand)

    def allowances(self, principal: Principal) -> dict[Limit, Allowance]:
        """What is left of each limit that a key has."""
        return Reservation([(quota, 0, quota.free()) for quota in self._quotas(principal)]).allowances()

    def add_used_today(self, tokens: Mapping[str, int]) -> None:
        """Adds what keys used today before this server started, in and out together."""
        for key_id, used in tokens.items():
            quota = self._of_key(key_id)[Limit.TOKENS_PER_DAY]
            quota.forget()
            quota.used += used

    def _quotas(self, principal: Principal) -> list["_Quota"]:
        """Return a quota for each limit that a key has; the operator may have changed them."""
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
                _Running(Limit.CONCURRENT, self._clock),
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
            f"the limit of this key is reached: {refused.most} {_NAMED[refused.limit]}",
            todo="send the request again later",
            limit=refused.limit.value,
            retry_after_s=max(1, math.ceil(longest)),
        )
    for quota, amount, _ in held:
        quota.reserved += amount
    return Reservation(held)


class _Quota(ABC):
    """What is taken of one limit of a key.

    What a request may use is reserved while it runs, and stays reserved: a reservation does not run out with time, as
    what was used does. So a key never has more of a minute's limit reserved and used together than the limit is.

    Args:
        clock: seconds.

    Attributes:
        most: the limit.
        used: what has not come free again, as of the last `forget`.
        reserved: what is taken until it is settled.
    """

    def __init__(self, limit: Limit, clock: Callable[[], float]) -> None:
        self.limit = limit
        self.most = self.reserved = 0
        self.used = self._at = 0.0
        self._clock = clock

    @abstractmethod
    def demanded(self, demand: Demand) -> int:
        """Return what a request reserves."""

    @abstractmethod
    def spent(self, tokens_in: int, tokens_out: int) -> int:
        """Return what a request has used in the end; it may be more than was reserved by an estimate."""

    @abstractmethod
    def forget(self) -> None:
        """Give back what has come free with time."""

    @abstractmethod
    def reset_s(self) -> float:
        """Return the seconds until all that was used is free again, without what is reserved: its end is unknown."""

    def free(self) -> float:
        """Return what may be reserved, with a share of the limit for rounding; negative where too much is taken."""
        self.forget()
        return self.most - self.used - self.reserved + _ROUNDING * self.most

    def wait_s(self, amount: int) -> float:
        """Return the seconds until there is room for so much; of use where there is none now."""
        missing = self.used + self.reserved + amount - self.most
        return _UNTIL_ONE_ENDS_S if missing > self.used + _ROUNDING * self.most else self._until_free_s(missing)

    def _until_free_s(self, missing: float) -> float:
        return self.reset_s()


class _OfMinute(_Quota):
    """So much a minute: what was used comes free again evenly, the whole limit within a minute."""

    def forget(self) -> None:
        now = self._clock()
        self.used = max(0.0, self.used - (now - self._at) * self.most / 60)
        self._at = now

    def reset_s(self) -> float:
        return self._until_free_s(self.used)

    def _until_free_s(self, missing: float) -> float:
        return missing * 60 / self.most


class _Requests(_OfMinute):
    def demanded(self, demand: Demand) -> int:
        return 1

    def spent(self, tokens_in: int, tokens_out: int) -> int:
        return 1


class _TokensIn(_OfMinute):
    def demanded(self, demand: Demand) -> int:
        return min(demand.tokens_in, self.most)

    def spent(self, tokens_in: int, tokens_out: int) -> int:
        return tokens_in


class _TokensOut(_OfMinute):
    def demanded(self, demand: Demand) -> int:
        """Return as much as there may be, where the client says nothing.

        Raises:
            RateLimitedError: the client asks for more than there ever is.
        """
        if demand.said and demand.tokens_out > self.most:
            raise RateLimitedError(
                f"the answers may take {demand.tokens_out} tokens, more than the limit of this key: {self.most} "
                f"{_NAMED[self.limit]}",
                todo="send a smaller 'n' or 'max_tokens'",
                limit=self.limit.value,
                retry_after_s=None,
            )
        return min(demand.tokens_out, self.most)

    def spent(self, tokens_in: int, tokens_out: int) -> int:
        return tokens_out


class _Running(_Quota):
    """So much at once: all that ends is free."""

    def demanded(self, demand: Demand) -> int:
        return 1

    def spent(self, tokens_in: int, tokens_out: int) -> int:
        return 0

    def forget(self) -> None:
        pass

    def reset_s(self) -> float:
        return 0.0


class _TokensOfDay(_Quota):
    """So much a day, from midnight UTC; its clock is the seconds since 1970."""

    def demanded(self, demand: Demand) -> int:
        asked = demand.tokens_in + demand.tokens_out
        return asked if demand.said else max(1, min(asked, int(self.most - self.used)))

    def spent(self, tokens_in: int, tokens_out: int) -> int:
        return tokens_in + tokens_out

    def forget(self) -> None:
        now = self._clock()
        if now // _DAY_S != self._at // _DAY_S:
            self.used = 0.0
        self._at = now

    def reset_s(self) -> float:
        return _DAY_S - self._clock() % _DAY_S
