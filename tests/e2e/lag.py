"""Reads a server's event loop lag from its metrics page."""

import math
from collections import Counter
from collections.abc import Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families

_BUCKETS = "svc_event_loop_lag_seconds_bucket"


def read_lag(url: str, headers: Mapping[str, str] | None = None) -> Counter[float]:
    """Return the number of event-loop wake-ups, keyed by the upper bound of their delay in seconds."""
    page = httpx.get(f"{url}/metrics", headers=headers, timeout=30, trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return Counter({float(one.labels["le"]): int(one.value) for one in samples if one.name == _BUCKETS})


def lag_figure(title: str, counts: Counter[float]) -> str:
    """Return the 50th, 99th and 99.9th percentiles of the lag as buckets.

    Args:
        counts: cumulative bucket counts, as in Prometheus; the difference of two readings.
    """
    total = counts[float("inf")]
    bounds = [_bound(counts, share * total) for share in (0.5, 0.99, 0.999)]
    p50, p99, p999 = (f"{bound * 1000:g}" for bound in bounds)
    return f"lag of the event loop, {title}: p50 {p50}, p99 {p99}, p99.9 {p999} ms at most, of {total} wake-ups"


def _bound(counts: Counter[float], wanted: float) -> float:
    return next(bound for bound in sorted(counts) if counts[bound] >= wanted)


def lag_ms(counts: Counter[float], share: float) -> float:
    """Return a percentile of the lag in milliseconds, interpolated within its bucket."""
    wanted, below, below_count = share * counts[float("inf")], 0.0, 0
    for bound in sorted(counts):
        if counts[bound] >= wanted:
            inside = (wanted - below_count) / max(1, counts[bound] - below_count)
            return 1000 * (below + inside * (min(bound, 10.0) - below))
        below, below_count = bound, counts[bound]
    return math.inf
