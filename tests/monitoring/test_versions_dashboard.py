"""Tests the values that Prometheus computes from given series for the comparison of two versions."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from svc.evaluation.intervals import Interval, proportion
from tests.monitoring.panel_queries import panel_queries
from tests.monitoring.promtool import case, run_cases

ROOT = Path(__file__).parents[2]
CHOSEN, OTHER = "0123456789ab:4", "fedcba987654:4"
QUERIES = panel_queries(
    ROOT / "monitoring" / "dashboards",
    {
        "job": ".*",
        "namespace": ".*",
        "instance": ".*",
        "model": "tiny",
        "version_a": "1",
        "version_b": "2",
        "heldout": CHOSEN,
    },
)
VERSIONS = {"A": "1", "B": "2"}
HOUR = 60  # samples, one per minute

Passes = Callable[[Iterable[dict[str, Any]]], None]


@pytest.fixture
def passes(tmp_path: Path) -> Passes:
    """Return a function that checks test cases, all in a single promtool run."""
    return partial(run_cases, tmp_path)


def query(panel: str, index: int = 0) -> str:
    """Return a query from a panel of the comparison, with its variables replaced."""
    return [query.expr for query in QUERIES if (query.dashboard, query.panel) == ("versions", panel)][index]


def counted(count: int) -> str:
    """Return a counter that reaches a count in equal steps over an hour, so that its increase is exact."""
    return f"0+{count / HOUR}x{HOUR}"


def ends(estimate: Interval) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


REQUESTS = 'svc_requests_total{model="tiny",version="1",route="r",status="200"}'
ERRORS = 'svc_request_errors_total{{model="tiny",version="1",reason="{}"}}'


@pytest.mark.slow
def test_only_server_faults_count_as_version_errors_on_the_dashboard(passes: Passes) -> None:
    faults = ("engine_died", "engine_timeout", "engine_error", "internal_error", "overloaded")
    of_clients = ("invalid_request", "context_length_exceeded", "body_too_large", "client_gone")
    passes(
        case(
            query("Error rate of A"),
            {REQUESTS: counted(600), ERRORS.format(reason): counted(60)},
            {'{version="1"}': 0.1 if reason in faults else 0},
        )
        for reason in (*faults, *of_clients)
    )


@pytest.mark.slow
def test_dashboard_counts_only_errors_of_the_selected_version(passes: Passes) -> None:
    series = {REQUESTS: counted(600), ERRORS.format("engine_died").replace('"1"', '"2"'): counted(60)}
    passes([case(query("Error rate of A"), series, {'{version="1"}': 0})])


@pytest.mark.slow
def test_error_rate_uses_the_same_confidence_interval_method_as_evaluations(passes: Passes) -> None:
    """Increases are extrapolated, so there may be more errors than requests. The share is then 1."""
    cases = []
    for side, version in VERSIONS.items():
        for errors, requests in ((0, 40), (3, 40), (40, 40), (5, 4)):
            series = {REQUESTS: counted(requests), ERRORS.format("engine_died"): counted(errors)}
            series = {name.replace('version="1"', f'version="{version}"'): values for name, values in series.items()}
            for index, end in enumerate(ends(proportion(min(errors, requests), requests))):
                cases.append(case(query(f"Error rate of {side}", index), series, {f'{{version="{version}"}}': end}))
    passes(cases)


@pytest.mark.slow
def test_p95_confidence_limits_match_the_normal_approximation_if_all_values_are_in_one_bucket(passes: Passes) -> None:
    """With one bucket from 0 to 1, a quantile is its own rank."""
    histograms = {"Response time": "svc_request_duration_seconds", "First token": "svc_time_to_first_token_seconds"}
    cases = []
    for (panel, histogram), (side, version), count in product(histograms.items(), VERSIONS.items(), (6, 600)):
        labels = f'model="tiny",version="{version}"'
        series = {f'{histogram}_bucket{{{labels},le="{le}"}}': counted(count) for le in ("1", "+Inf")}
        series[f"{histogram}_count{{{labels}}}"] = counted(count)
        spread = 1.959964 * math.sqrt(0.95 * 0.05 / count)
        for index, end in enumerate((0.95, max(0.0, 0.95 - spread), min(1.0, 0.95 + spread))):
            cases.append(case(query(f"{panel} of {side}, p95", index), series, {f'{{version="{version}"}}': end}))
    passes(cases)


def judged(version: str, heldout: str, suffix: str = "") -> str:
    labels = f'model="tiny",version="{version}",heldout="{heldout}",format="merged",metric="exact_match",primary="true"'
    return f"svc_registry_version_evaluation{suffix}{{{labels}}}"


@pytest.mark.slow
def test_only_versions_evaluated_on_the_chosen_held_out_set_are_compared(passes: Passes) -> None:
    passes(
        case(
            query("Answers", index),
            {judged("1", CHOSEN, suffix): "0.5x60", judged("2", OTHER, suffix): "0.75x60"},
            {'{version="1",format="merged",metric="exact_match"}': 0.5},
        )
        for index, suffix in enumerate(("", "_low", "_high"))
    )


@pytest.mark.slow
def test_held_out_set_menu_lists_only_the_sets_of_the_compared_versions(passes: Passes) -> None:
    series = {judged("1", CHOSEN): "1x60", judged("2", OTHER): "1x60", judged("3", "aaaaaaaaaaaa:4"): "1x60"}
    passes([case(query("variable heldout"), series, {f'{{heldout="{heldout}"}}': 1 for heldout in (CHOSEN, OTHER)})])


@pytest.mark.slow
def test_good_feedback_rate_uses_the_same_confidence_interval_method_as_evaluations(passes: Passes) -> None:
    feedback = 'svc_feedback_total{{model="tiny",version="1",rating="{}"}}'
    passes(
        case(
            query("Good feedback", index),
            {feedback.format("good"): f"{good}x60", feedback.format("bad"): f"{bad}x60"},
            {'{version="1"}': end},
        )
        for good, bad in ((0, 4), (3, 1), (4, 0))
        for index, end in enumerate(ends(proportion(good, good + bad)), start=1)
    )
