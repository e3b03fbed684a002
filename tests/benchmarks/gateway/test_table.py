"""Tests the benchmark's table: medians, added times within a round and ratios within rounds."""

from dataclasses import fields, replace

import pytest
from rich.console import Console

from benchmarks.gateway.measure import Figures, quantile
from benchmarks.gateway.table import complete, summary, tables

ONES = Figures(**{each.name: 1.0 for each in fields(Figures)})


def figures(**values: float) -> Figures:
    """Return measurements that are all 1 except for the given values."""
    return replace(ONES, **values)


def printed(rounds: list[dict[str, Figures]]) -> list[str]:
    """Return the printed lines of the tables."""
    console = Console(width=200)
    with console.capture() as capture:
        for table in tables(summary(rounds)):
            console.print(table)
    return capture.get().splitlines()


@pytest.mark.parametrize(("share", "value"), [(0.5, 50.0), (0.99, 99.0), (1.0, 100.0), (0.001, 1.0)])
def test_reported_quantile_is_one_of_the_measured_values(share: float, value: float) -> None:
    assert quantile([float(number) for number in range(100, 0, -1)], share) == value


def test_first_token_delay_added_by_a_gateway_is_measured_against_direct_requests_in_the_same_round() -> None:
    rounds = [
        {"direct": figures(first_ms_p50=own), "nginx": figures(first_ms_p50=through)}
        for own, through in [(1.0, 1.5), (5.0, 5.25), (2.0, 4.0)]
    ]
    assert summary(rounds)["gateways"]["nginx"]["first_ms_p50"]["median"] == pytest.approx(0.5)


def test_gateway_ratio_is_the_median_of_the_per_round_ratios() -> None:
    rounds = [
        {"tuneserve": figures(request_ms_64=ours), "vllm-router": figures(request_ms_64=router)}
        for ours, router in [(2.0, 1.0), (12.0, 4.0), (40.0, 10.0)]
    ]
    ratio = summary(rounds)["ratios"]["tuneserve / vllm-router"]["request_ms_64"]
    assert ratio["median"] == 3.0
    assert ratio["low"] < 3.0 < ratio["high"]


def test_benchmark_with_a_single_round_has_no_confidence_interval() -> None:
    rate = summary([{"nginx": ONES}])["gateways"]["nginx"]["rate"]
    assert rate == {"median": 1.0, "low": None, "high": None}


def test_gateway_that_is_missing_from_some_rounds_is_skipped() -> None:
    rounds = complete([{"direct": ONES, "nginx": ONES, "LiteLLM": ONES}, {"nginx": ONES, "direct": ONES}])
    assert [list(each) for each in rounds] == [["direct", "nginx"]] * 2


@pytest.mark.parametrize(("busy", "cell"), [(0.5, "≥ 7"), (0.95, "7")])
def test_rate_is_shown_as_a_lower_bound_unless_the_gateway_was_the_bottleneck(busy: float, cell: str) -> None:
    [line] = [line for line in printed([{"nginx": figures(rate=7.0, busy=busy)}]) if "requests/s" in line]
    assert line.split("requests/s")[1].strip() == cell
