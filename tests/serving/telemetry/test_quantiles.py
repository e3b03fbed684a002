"""Tests that quantiles are accurate within one per cent and cover only the last five minutes."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from serving.telemetry.quantiles import QUANTILES, SLOT_S, SLOTS, VersionQuantiles
from tests.builders.clocks import Clock

WINDOW_S = SLOTS * SLOT_S
SECONDS = st.floats(min_value=1e-4, max_value=3600)


def example(clock: Callable[[], float]) -> VersionQuantiles:
    return VersionQuantiles("svc_example", "Example", clock, registry=CollectorRegistry())


def shown(versions: VersionQuantiles) -> dict[tuple[str, str], float]:
    """Return the value of each sample, keyed by version and quantile."""
    (family,) = versions.collect()
    return {(sample.labels["version"], sample.labels["quantile"]): sample.value for sample in family.samples}


@given(st.lists(st.tuples(SECONDS, st.integers(0, SLOTS - 1)), min_size=1, max_size=200))
def test_quantiles_over_the_whole_window_are_within_one_percent_of_exact_quantiles(
    samples: list[tuple[float, int]],
) -> None:
    clock = Clock(1000.0)
    versions = example(clock)
    for value, slot in sorted(samples, key=lambda sample: sample[1]):
        clock.now = slot * SLOT_S
        versions.observe(("tuned", "1"), value)
    ordered = sorted(value for value, _ in samples)
    values = shown(versions)
    for quantile in QUANTILES:
        exact = ordered[int(quantile * (len(ordered) - 1))]
        assert math.isclose(values["1", str(quantile)], exact, rel_tol=0.0101)


def test_quantile_is_nearly_zero_if_a_request_took_zero_seconds() -> None:
    versions = example(Clock(1000.0))
    versions.observe(("tuned", "1"), 0.0)
    assert 0 < shown(versions)["1", "0.5"] < 1e-5


def test_sample_expires_at_the_end_of_the_window() -> None:
    clock = Clock()
    versions = example(clock)
    versions.observe(("tuned", "1"), 1.0)
    clock.now = WINDOW_S - 0.1
    assert shown(versions)
    clock.now = WINDOW_S
    assert shown(versions) == {}


def test_old_samples_expire_even_if_new_samples_arrive() -> None:
    clock = Clock(1000.0)
    versions = example(clock)
    versions.observe(("tuned", "1"), 100.0)
    clock.now += WINDOW_S
    versions.observe(("tuned", "1"), 1.0)
    assert all(value < 2 for value in shown(versions).values())


def test_quantile_memory_is_bounded_by_the_number_of_window_slots() -> None:
    clock = Clock(1000.0)
    versions = example(clock)
    for _ in range(1000):
        clock.now += 7
        versions.observe(("tuned", "1"), 1.0)
    assert len(versions._slots) <= SLOTS


def test_version_without_recent_samples_has_no_metric_series() -> None:
    clock = Clock(1000.0)
    versions = example(clock)
    versions.observe(("tuned", "1"), 1.0)
    clock.now += WINDOW_S
    versions.observe(("tuned", "2"), 1.0)
    assert set(shown(versions)) == {("2", "0.5"), ("2", "0.95"), ("2", "0.99")}


def test_samples_may_arrive_while_metrics_are_written() -> None:
    """Metrics pages are written in separate threads."""
    clock = Clock(1000.0)
    versions = example(clock)

    def scrape() -> None:
        for _ in range(300):
            shown(versions)

    with ThreadPoolExecutor(1) as threads:
        scraping = threads.submit(scrape)
        number = 0
        while not scraping.done():
            number += 1
            clock.now += WINDOW_S / 7
            versions.observe(("tuned", str(number % 50 + 1)), 1.0)
        scraping.result()
