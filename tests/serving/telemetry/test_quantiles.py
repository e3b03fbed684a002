"""Quantiles within one per cent, over the last five minutes only."""

import math
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from serving.telemetry.quantiles import QUANTILES, SLOT_S, SLOTS, RollingQuantiles, VersionQuantiles
from svc.version import VersionId
from tests.serving.service import ONE, TWO

WINDOW_S = SLOTS * SLOT_S
SECONDS = st.floats(min_value=1e-4, max_value=3600)


class Clock:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(SECONDS, st.integers(0, SLOTS - 1)), min_size=1, max_size=200))
def test_quantiles_over_all_slots_are_within_one_per_cent_of_the_exact_ones(samples: list[tuple[float, int]]) -> None:
    clock = Clock()
    rolling = RollingQuantiles(clock)
    for value, slot in sorted(samples, key=lambda sample: sample[1]):
        clock.now = slot * SLOT_S
        rolling.observe(value)
    ordered = sorted(value for value, _ in samples)
    for quantile, found in zip(QUANTILES, rolling.quantiles(), strict=True):
        exact = ordered[int(quantile * (len(ordered) - 1))]
        assert math.isclose(found, exact, rel_tol=0.0101)


def test_a_sample_stays_nearly_as_long_as_the_window_and_then_leaves() -> None:
    clock = Clock()
    clock.now = 0.0
    rolling = RollingQuantiles(clock)
    rolling.observe(1.0)
    clock.now = WINDOW_S - 0.1
    assert rolling.quantiles()
    clock.now = WINDOW_S
    assert rolling.quantiles() == []


def test_old_samples_leave_while_new_ones_come() -> None:
    clock = Clock()
    rolling = RollingQuantiles(clock)
    rolling.observe(100.0)
    clock.now += WINDOW_S
    rolling.observe(1.0)
    assert all(value < 2 for value in rolling.quantiles())


def test_memory_is_bounded_by_the_slots_of_the_window() -> None:
    clock = Clock()
    rolling = RollingQuantiles(clock)
    for _ in range(1000):
        clock.now += 7
        rolling.observe(1.0)
    assert len(rolling._slots) <= SLOTS


def test_a_version_without_samples_in_the_window_has_no_series() -> None:
    clock = Clock()
    versions = VersionQuantiles("svc_example", "Example", clock)
    versions.observe(ONE.version, 1.0)
    clock.now += WINDOW_S
    versions.observe(TWO.version, 1.0)
    (family,) = versions.collect()
    assert {sample.labels["version"] for sample in family.samples} == {"2"}
    assert {sample.labels["quantile"] for sample in family.samples} == {"0.5", "0.95", "0.99"}


def test_samples_may_come_while_a_page_is_written() -> None:
    """Pages are written in threads of their own."""
    clock = Clock()
    versions = VersionQuantiles("svc_example", "Example", clock)

    def scrape() -> None:
        for _ in range(300):
            versions.quantiles()

    with ThreadPoolExecutor(1) as threads:
        scraping = threads.submit(scrape)
        number = 0
        while not scraping.done():
            number += 1
            clock.now += WINDOW_S / 7
            versions.observe(VersionId("tuned", number % 50 + 1), 1.0)
        scraping.result()
