"""The histogram without locks says what the library's says."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import generate_latest

from serving.telemetry.loop_histogram import LoopHistogram

BUCKETS = (0.0025, 0.01, 0.5, 1, 10)
seconds = st.floats(0, 20, allow_subnormal=False) | st.sampled_from(BUCKETS)


@given(st.lists(st.tuples(st.sampled_from(["1", "2"]), seconds)))
def test_its_page_is_that_of_the_librarys(samples: Sequence[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    loop = LoopHistogram("h_seconds", "Some help", ("version",), buckets=BUCKETS)
    ours.register(loop)
    library = Histogram("h_seconds", "Some help", ("version",), buckets=BUCKETS, registry=theirs)
    for version, value in samples:
        loop.series(version).observe(value)
        library.labels(version).observe(value)
    lines = [line for line in generate_latest(theirs).splitlines() if b"_created" not in line]
    assert generate_latest(ours).splitlines() == lines


def test_a_series_is_the_same_at_the_next_look() -> None:
    histogram = LoopHistogram("h_seconds", "Some help", ("version",), buckets=BUCKETS)
    assert histogram.series("1") is histogram.series("1")
