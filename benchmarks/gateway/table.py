"""Computes medians, intervals and ratios over rounds and prints them as tables."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.table import Column, Table

from benchmarks.gateway.measure import FULL, Figures
from benchmarks.interval import interval

Round = Mapping[str, Figures]
"""Measurements of one round, keyed by gateway."""
DIRECT, OURS, KEYLESS, TRACED = "direct", "tuneserve", "tuneserve without keys", "tuneserve with traces"
STORED, BARE = "tuneserve on PostgreSQL", "connections alone"
REPLICATED = "tuneserve with 20 replicas"
_ADDED = ("first_ms_p50", "first_ms_p99", "first_64_ms_p50", "first_64_ms_p99")
_ROWS = {
    "request_ms_1": ("CPU, ms/request, 1 client", 3),
    "request_ms_64": ("CPU, ms/request, 64 clients", 3),
    "chunk_us_16": ("CPU, us/chunk, 16 streams", 0),
    "reads_16": ("  reads/chunk", 2),
    "chunk_us_100": ("CPU, us/chunk, 100 streams", 0),
    "reads_100": ("  reads/chunk", 2),
    "first_ms_p50": ("TTFT added, ms, p50", 2),
    "first_ms_p99": ("TTFT added, ms, p99", 2),
    "first_64_ms_p50": ("  with 64 other streams, p50", 1),
    "first_64_ms_p99": ("  with 64 other streams, p99", 1),
    "rate": ("requests/s", 0),
    "many_failed": ("1,024 streams: failed", 0),
    "many_chunk_us": ("1,024 streams: us/chunk", 0),
    "many_mib": ("1,024 streams: MiB", 0),
    "rest_ms": ("at rest: CPU, ms/s", 1),
    "idle_mib": ("at rest: MiB", 0),
    "taken": ("others' share of its core", 2),
}
_OF_DIRECT = ("rate", "reads_16", "reads_100", "many_failed", "taken")
_RATIOS = ((OURS, "vllm-router"), ("LiteLLM", OURS), (BARE, "vllm-router"), (STORED, OURS), (REPLICATED, OURS))
_COMPARED = ("request_ms_1", "request_ms_64", "chunk_us_16", "chunk_us_100", "first_ms_p50", "rate", "many_mib")


def complete(rounds: Sequence[Round]) -> list[Round]:
    """Return the rounds with only the gateways that were measured in all of them, in the first round's order."""
    names = [name for name in rounds[0] if all(name in each for each in rounds)]
    return [{name: each[name] for name in names} for each in rounds]


def added(measured: Round) -> dict[str, Figures]:
    """Return the round with the upstream's own times subtracted from the times to the first token."""
    if DIRECT not in measured:
        return dict(measured)
    own = asdict(measured[DIRECT])
    return {
        name: figures
        if name == DIRECT
        else replace(figures, **{key: getattr(figures, key) - own[key] for key in _ADDED})
        for name, figures in measured.items()
    }


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Return each gateway's medians and intervals of its means, plus the ratios of gateway pairs within rounds."""
    rounds = [added(each) for each in rounds]
    figures = {
        name: {key: _spread([asdict(each[name])[key] for each in rounds]) for key in asdict(rounds[0][name])}
        for name in rounds[0]
    }
    ratios = {
        f"{upper} / {lower}": {
            key: _spread([_ratio(asdict(each[upper])[key], asdict(each[lower])[key]) for each in rounds])
            for key in _COMPARED
        }
        for upper, lower in _RATIOS
        if upper in rounds[0] and lower in rounds[0]
    }
    return {"gateways": figures, "ratios": ratios}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    low, high = interval(values) if len(values) > 1 else (None, None)
    return {"median": statistics.median(values), "low": low, "high": high}


def _ratio(upper: float, lower: float) -> float:
    return upper / lower if lower else float("nan")


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of measurements and ratios, with one column per gateway."""
    gateways = result["gateways"]
    figures = Table(Column("median ± half of the mean's 95%", no_wrap=True), *gateways, box=None)
    for key, (title, digits) in _ROWS.items():
        figures.add_row(title, *(_cell(key, name, gateway, digits) for name, gateway in gateways.items()))
    ratios = Table(Column("ratio within rounds", no_wrap=True), *result["ratios"], box=None)
    for key in _COMPARED:
        ratios.add_row(_ROWS[key][0], *(_text(each[key], 2) for each in result["ratios"].values()))
    return [figures, ratios] if result["ratios"] else [figures]


def _cell(key: str, name: str, gateway: Mapping[str, Any], digits: int) -> str:
    if name == DIRECT and key not in _ADDED and key not in _OF_DIRECT:
        return "-"
    limited = key == "rate" and gateway["busy"]["median"] < FULL
    return ("≥ " if limited else "") + _text(gateway[key], digits)


def _text(spread: Mapping[str, Any], digits: int) -> str:
    median = f"{spread['median']:,.{digits}f}"
    return median if spread["low"] is None else f"{median} ± {(spread['high'] - spread['low']) / 2:,.{digits}f}"
