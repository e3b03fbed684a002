"""Measures a real engine's throughput in tokens per second, through `svc serve` and at its vLLM socket."""

import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.gateway.bench import until_answered
from benchmarks.gateway.load import Address, Ask, send
from benchmarks.gateway.peers import free_port
from benchmarks.gateway.processes import running
from benchmarks.interval import interval
from benchmarks.start_time import Subject
from svc.errors import EngineError
from svc.settings.settings import Settings
from svc.terminal import counting

_STREAMS = 8
_TOKENS = 256
_START_S = 900.0


@dataclass(frozen=True, slots=True)
class Pair:
    """Two consecutive throughput measurements, in tokens per second summed over all streams.

    Attributes:
        direct: throughput at vLLM's own socket.
        served: throughput through the gateway.
    """

    direct: float
    served: float


def measure_engine(settings: Settings, model: str, pairs: int, log: Path) -> list[Pair]:
    """Serve a model from a home and measure both paths in alternating order.

    Raises:
        NotFoundError: the model does not exist or has no version.
        EngineError: the server does not start, or a request failed.
    """
    spec = Subject.of(settings, model).spec
    ask = Ask(_TOKENS, stream=True, model=spec.served_name, real=True)
    measured = []
    with _served(settings, model, ask, log) as served, counting("measurements", 2 * (pairs + 1)) as advance:
        ways = {"direct": Address(socket=spec.socket), "served": served}
        for number in range(pairs + 1):
            rates = {}
            for way in reversed(ways) if number % 2 else ways:
                rates[way] = _rate(ways[way], ask)
                advance()
            if number:  # the first pair warms the engine
                measured.append(Pair(**rates))
    return measured


@contextmanager
def _served(settings: Settings, model: str, ask: Ask, log: Path) -> Iterator[Address]:
    address = Address(free_port())
    arguments = [sys.executable, "-m", "svc.cli", "--home", str(settings.home), "serve", model]
    with running([*arguments, "--port", str(address.port)], log=log) as process:
        until_answered(process, log, address, Ask(1, model=ask.model, real=True), seconds=_START_S)
        yield address


def _rate(address: Address, ask: Ask) -> float:
    load = uvloop.run(send(address, ask, clients=_STREAMS, requests=_STREAMS, patience_s=600.0))
    if load.failed:
        raise EngineError(f"{load.failed} of {_STREAMS} streams failed: {load.wrong}", todo="read the server's log")
    return load.rate * ask.chunks


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return the median throughputs in tokens per second, and the ratio of the served to the direct throughput."""
    shares = [pair.served / pair.direct for pair in pairs]
    low, high = interval(shares) if len(shares) > 1 else (None, None)
    return {
        "direct": statistics.median(pair.direct for pair in pairs),
        "served": statistics.median(pair.served for pair in pairs),
        "share": {"median": statistics.median(shares), "low": low, "high": high},
        "pairs": [asdict(pair) for pair in pairs],
    }
