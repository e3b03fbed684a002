"""Tests that the lock-free instruments write the same metrics page as the library's instruments."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest

from serving.telemetry.loop_instruments import LoopCounter, LoopHistogram

BUCKETS = (0.0025, 0.01, 0.5, 1, 10)
LABELS = ("version", "direction")
seconds = st.floats(0, 20, allow_subnormal=False) | st.sampled_from(BUCKETS)
labels = st.tuples(st.sampled_from(["1", "2"]), st.sampled_from(["in", 'o"ut\n']))


@given(st.lists(st.tuples(labels, st.integers(0, 2**40))))
def test_counter_output_matches_prometheus_client(counted: Sequence[tuple[tuple[str, str], int]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    loop = LoopCounter("things_total", "Some help", LABELS, registry=ours)
    library = Counter("things_total", "Some help", LABELS, registry=theirs)
    for of, amount in counted:
        loop.counts[of] += amount
        library.labels(*of).inc(amount)
    assert generate_latest(ours).splitlines() == _page(theirs)


@given(st.lists(st.tuples(st.sampled_from(["1", "2"]), seconds)))
def test_histogram_output_matches_prometheus_client(samples: Sequence[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    loop = LoopHistogram("h_seconds", "Some help", ("version",), BUCKETS, registry=ours)
    library = Histogram("h_seconds", "Some help", ("version",), buckets=BUCKETS, registry=theirs)
    for version, value in samples:
        loop.series(version).observe(value)
        library.labels(version).observe(value)
    assert generate_latest(ours).splitlines() == _page(theirs)


def test_repeated_lookup_returns_the_same_metric_series() -> None:
    histogram = LoopHistogram("h_seconds", "Some help", ("version",), BUCKETS, registry=CollectorRegistry())
    assert histogram.series("1") is histogram.series("1")


def _page(registry: CollectorRegistry) -> list[bytes]:
    return [line for line in generate_latest(registry).splitlines() if b"_created" not in line]
