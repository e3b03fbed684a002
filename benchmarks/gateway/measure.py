"""What one gateway costs in one round: the loads, one after the other, and what its processes used for each."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.gateway.load import Address, Ask, Load, send
from benchmarks.gateway.processes import core_seconds, cpu_seconds, resident_bytes

_SETTLE_S = 1.0
"""What a gateway does after an answer, as writing rows down, counts too."""
_REST_S, _LOAD_S, _MOST_S = 2.0, 3.0, 60.0
_WHOLE = Ask(chunks=16)
_SHORT_STREAM = Ask(chunks=3, stream=True)
_HALF_SECOND = Ask(chunks=50, stream=True)
_SECOND = Ask(chunks=100, stream=True)
_MANY = Ask(chunks=20, stream=True)
_PACE_S, _SLOW_PACE_S = 0.01, 0.1
FULL = 0.9
"""Share of its core from which on a gateway is the limit, and not what asks it."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one gateway in one round; what is of its processes is 0 where it has none.

    Attributes:
        request_ms_1, request_ms_16, request_ms_64: processor time of a request that is not streamed, by clients.
        rate: requests a second of 64 clients.
        busy: share of its core that it used for that.
        chunk_us_16, chunk_us_100: processor time of a stream of 100 chunks, by chunk, with so many streams.
        reads_16, reads_100: how often a client had to read for a chunk: less than 1 where chunks came several at once,
            as from a gateway that had no time for each.
        first_ms_p50, first_ms_p99: time to the first event, of one stream at a time.
        first_64_ms_p50, first_64_ms_p99: of 64 streams at once.
        many_failed: of 1,024 streams at once, those without a whole answer.
        many_chunk_us: processor time of each of their chunks.
        rest_ms: processor time of a second without requests. A part of it is in all that is told of few requests.
        idle_mib, many_mib: memory after the start, and after those 1,024.
        failed: of all other requests.
        taken: share of its core that went to others all the while: then rates and times say little.
    """

    request_ms_1: float
    request_ms_16: float
    request_ms_64: float
    rate: float
    busy: float
    chunk_us_16: float
    reads_16: float
    chunk_us_100: float
    reads_100: float
    first_ms_p50: float
    first_ms_p99: float
    first_64_ms_p50: float
    first_64_ms_p99: float
    many_failed: float
    many_chunk_us: float
    rest_ms: float
    idle_mib: float
    many_mib: float
    failed: float
    taken: float


class Measurement:
    """Loads one gateway.

    Args:
        pid: of its first process; None where it has none.
        core: its own.
        set_pace: has the upstream wait so long between chunks, seconds.
        tell: hears of what went wrong.
    """

    def __init__(
        self,
        address: Address,
        pid: int | None,
        core: int,
        set_pace: Callable[[float], None],
        tell: Callable[[str], None],
    ) -> None:
        self._address = address
        self._core = core
        self._pid = pid
        self._set_pace = set_pace
        self._tell = tell
        self._cpu = 0.0
        self._failed = 0

    async def run(self) -> Figures:
        """Takes all figures, in half a minute where the gateway is quick."""
        await self._warm()
        idle = self._memory()
        began, core, own = time.monotonic(), core_seconds(self._core), self._used()
        await asyncio.sleep(_REST_S)
        rest = (self._used() - own) / _REST_S
        one, one_cpu = await self._load(_WHOLE, clients=1, seconds=_LOAD_S)
        some, some_cpu = await self._load(_WHOLE, clients=16, seconds=_LOAD_S)
        most, most_cpu = await self._load(_WHOLE, clients=64, seconds=_LOAD_S)
        few, few_cpu = await self._load(_SECOND, clients=16, requests=96)
        hundred, hundred_cpu = await self._load(_SECOND, clients=100, requests=200)
        alone, _ = await self._load(_SHORT_STREAM, clients=1, requests=200)
        beside, _ = await self._load(_HALF_SECOND, clients=64, requests=512, spread_s=0.5)
        failed = self._failed
        self._set_pace(_SLOW_PACE_S)
        many, many_cpu = await self._load(_MANY, clients=1024, requests=1024)
        self._set_pace(_PACE_S)
        taken = (core_seconds(self._core) - core) - (self._used() - own)
        return Figures(
            request_ms_1=1e3 * _each(one_cpu, one.done),
            request_ms_16=1e3 * _each(some_cpu, some.done),
            request_ms_64=1e3 * _each(most_cpu, most.done),
            rate=most.rate,
            busy=most_cpu / most.seconds,
            chunk_us_16=1e6 * _each(few_cpu, few.done * _SECOND.chunks),
            reads_16=_each(few.reads, few.done * _SECOND.chunks),
            chunk_us_100=1e6 * _each(hundred_cpu, hundred.done * _SECOND.chunks),
            reads_100=_each(hundred.reads, hundred.done * _SECOND.chunks),
            first_ms_p50=1e3 * quantile(alone.first, 0.5),
            first_ms_p99=1e3 * quantile(alone.first, 0.99),
            first_64_ms_p50=1e3 * quantile(beside.first, 0.5),
            first_64_ms_p99=1e3 * quantile(beside.first, 0.99),
            many_failed=many.failed,
            many_chunk_us=1e6 * _each(many_cpu, many.done * _MANY.chunks),
            rest_ms=1e3 * rest,
            idle_mib=idle,
            many_mib=self._memory(),
            failed=failed,
            taken=taken / (time.monotonic() - began),
        )

    async def _warm(self) -> None:
        """What is made at the first requests counts for none."""
        await self._load(_WHOLE, clients=4, seconds=1.0)
        await self._load(_SHORT_STREAM, clients=4, requests=40)
        self._failed = 0

    async def _load(
        self,
        ask: Ask,
        *,
        clients: int,
        requests: int | None = None,
        seconds: float = _MOST_S,
        spread_s: float = 0.0,
    ) -> tuple[Load, float]:
        """What became of the requests, and what they took of the processor."""
        load = await send(
            self._address,
            ask,
            clients=clients,
            requests=requests,
            seconds=seconds,
            spread_s=spread_s,
            on_connected=self._start,
        )
        await asyncio.sleep(_SETTLE_S)
        self._failed += load.failed
        if load.failed:
            self._tell(f"{load.failed} of {load.failed + load.done} requests failed: {load.wrong}")
        return load, self._used() - self._cpu

    def _start(self) -> None:
        self._cpu = self._used()

    def _used(self) -> float:
        return cpu_seconds(self._pid) if self._pid else 0.0

    def _memory(self) -> float:
        return resident_bytes(self._pid) / 2**20 if self._pid else 0.0


def _each(total: float, number: int) -> float:
    return total / number if number else float("nan")


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all is no larger than; NaN of none."""
    ranked = sorted(values)
    return ranked[max(0, -int(-share * len(ranked) // 1) - 1)] if ranked else float("nan")
