"""The counter without locks says what the library's says."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import generate_latest

from serving.telemetry.loop_counter import LoopCounter

LABELS = ("version", "direction")
labels = st.tuples(st.sampled_from(["1", "2"]), st.sampled_from(["in", 'o"ut\n']))


@given(st.lists(st.tuples(labels, st.integers(0, 2**40))))
def test_its_page_is_that_of_the_librarys(counted: Sequence[tuple[tuple[str, str], int]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    loop = LoopCounter("things_total", "Some help", LABELS)
    ours.register(loop)
    library = Counter("things_total", "Some help", LABELS, registry=theirs)
    for of, amount in counted:
        loop.count(*of).add(amount)
        library.labels(*of).inc(amount)
    lines = [line for line in generate_latest(theirs).splitlines() if b"_created" not in line]
    assert generate_latest(ours).splitlines() == lines


def test_a_count_is_the_same_at_the_next_look() -> None:
    counter = LoopCounter("things_total", "Some help", LABELS)
    assert counter.count("1", "in") is counter.count("1", "in")


def test_what_is_looked_up_is_shown_before_it_is_counted() -> None:
    registry = CollectorRegistry()
    counter = LoopCounter("things_total", "Some help", LABELS)
    registry.register(counter)
    counter.count("1", "in")
    assert registry.get_sample_value("things_total", {"version": "1", "direction": "in"}) == 0
