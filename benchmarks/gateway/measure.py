"""Measures one gateway in one round: runs each load in turn and records the CPU time used."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.gateway.load import Address, Ask, Load, send
from benchmarks.gateway.processes import core_seconds, cpu_seconds, resident_bytes

_SETTLE_S = 1.0
"""Pause after the last response, in seconds, so that later work, such as writing rows, is counted too."""
_REST_S, _LOAD_S, _MAX_S = 10.0, 3.0, 60.0
_WHOLE = Ask(chunks=16)
_SHORT_STREAM = Ask(chunks=3, stream=True)
_HALF_SECOND = Ask(chunks=50, stream=True)
_SECOND = Ask(chunks=100, stream=True)
_MANY = Ask(chunks=20, stream=True)
_PACE_S, _SLOW_PACE_S = 0.01, 0.1
FULL = 0.9
"""Share of a gateway's core above which the gateway, rather than the clients, limits the request rate."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Measurements of one gateway in one round. CPU time and memory are 0 if the gateway has no process.

    Attributes:
        request_ms_1, request_ms_16, request_ms_64: CPU time per non-streamed request, by number of clients.
        rate: requests per second with 64 clients.
        busy: share of the gateway's core in use at this rate.
        chunk_us_16, chunk_us_100: CPU time per chunk for streams of 100 chunks, by number of streams.
        reads_16, reads_100: client reads per chunk; less than 1 if several chunks arrived together, as from
            a gateway that is too slow to forward each chunk separately.
        first_ms_p50, first_ms_p99: time to the first event with one stream at a time.
        first_64_ms_p50, first_64_ms_p99: time to the first event with 64 concurrent streams.
        many_failed: incomplete responses among 1,024 concurrent streams.
        many_chunk_us: CPU time per chunk of these 1,024 streams.
        rest_ms: CPU time per second without requests; the figures for low rates include some of it.
        idle_mib, many_mib: memory after the start and after the 1,024 streams.
        failed: number of failures among all other requests.
        taken: share of the gateway's core used by other processes; if it is large, rates and times mean
            little.
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
    """Measures a single gateway.

    Args:
        pid: id of the gateway's first process, or None if it has no process.
        core: CPU core of the gateway.
        set_pace: sets the upstream's pause between chunks, in seconds.
        tell: callback that receives failures.
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
        """Run all measurements and return them. Takes half a minute for a fast gateway."""
        await self._warm()
        idle = self._memory()
        began, core, own = time.monotonic(), core_seconds(self._core), self._used()
        await asyncio.sleep(_REST_S)
        rest = (self._used() - own) / _REST_S
        single, single_cpu = await self._load(_WHOLE, clients=1, seconds=_LOAD_S)
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
            request_ms_1=1e3 * _each(single_cpu, single.done),
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
        """Send warm-up requests, so that one-time work is not measured."""
        await self._load(_WHOLE, clients=4, seconds=1.0)
        await self._load(_SHORT_STREAM, clients=4, requests=40)
        self._failed = 0

    async def _load(
        self,
        ask: Ask,
        *,
        clients: int,
        requests: int | None = None,
        seconds: float = _MAX_S,
        spread_s: float = 0.0,
    ) -> tuple[Load, float]:
        """Run the given load and return its result and the gateway's CPU time."""
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
    """Return the smallest value that at least `share` of the values do not exceed, or NaN without values."""
    ranked = sorted(values)
    return ranked[max(0, -int(-share * len(ranked) // 1) - 1)] if ranked else float("nan")
