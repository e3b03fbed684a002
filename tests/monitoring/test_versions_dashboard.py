"""What the comparison of two versions shows of given series, as Prometheus computes it."""

import math
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from monitoring.dashboards.promql import quantile_interval, share_interval
from svc.evaluation.estimate import Estimate, proportion
from tests.monitoring.panel_queries import panel_queries

ROOT = Path(__file__).parents[2]
PROMTOOL = ROOT / ".venv" / "prometheus" / "bin" / "promtool"
CHOSEN, OTHER = "0123456789ab:4", "fedcba987654:4"
QUERIES = panel_queries(
    ROOT / "deploy" / "grafana" / "dashboards",
    {"model": "tiny", "version_a": "1", "version_b": "2", "heldout": CHOSEN},
)
HOUR = 60  # samples, one a minute

Shows = Callable[[str, Mapping[str, str], Mapping[str, float]], None]


@pytest.fixture
def shows(tmp_path: Path) -> Shows:
    """Asserts what a query gives after an hour of series, rounded to four digits."""

    def shows(expr: str, series: Mapping[str, str], expected: Mapping[str, float]) -> None:
        samples = [{"labels": labels, "value": round(value, 4)} for labels, value in expected.items()]
        check = {"expr": f"round({expr}, 0.0001)", "eval_time": "1h", "exp_samples": samples}
        given = [{"series": name, "values": values} for name, values in series.items()]
        case = {"interval": "1m", "input_series": given, "promql_expr_test": [check]}
        page = tmp_path / "test.yml"
        page.write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [case]}), "utf-8")
        done = subprocess.run([PROMTOOL, "test", "rules", page], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return shows


def query(panel: str, index: int = 0) -> str:
    """A query of a panel of the comparison, without variables."""
    return [query.expr for query in QUERIES if (query.dashboard, query.panel) == ("versions", panel)][index]


def counted(count: int) -> str:
    """A counter that reaches a count in an hour of steps, so that its increase is exact."""
    return f"0+{count / HOUR}x{HOUR}"


def ends(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


@pytest.mark.parametrize(("part", "whole"), [(0, 40), (3, 40), (40, 40)])
def test_the_interval_of_a_share_is_that_of_evaluations(shows: Shows, part: int, whole: int) -> None:
    interval = share_interval("sum by (v) (part)", "sum by (v) (whole)")
    series = {'part{v="1"}': f"{part}x60", 'whole{v="1"}': f"{whole}x60"}
    for expr, end in zip((interval.value, interval.low, interval.high), ends(proportion(part, whole)), strict=True):
        shows(expr, series, {'{v="1"}': end})


def test_an_extrapolated_part_is_at_most_the_whole(shows: Shows) -> None:
    interval = share_interval("sum by (v) (part)", "sum by (v) (whole)")
    shows(interval.low, {'part{v="1"}': "5x60", 'whole{v="1"}': "4x60"}, {'{v="1"}': proportion(4, 4).low})


@pytest.mark.parametrize("count", [6, 600])
def test_the_interval_of_a_quantile_is_that_of_its_rank(shows: Shows, count: int) -> None:
    """With one bucket from 0 to 1, a quantile is its own rank."""
    interval = quantile_interval(0.95, 'seconds{v="1"}', "v")
    series = {f'seconds_bucket{{v="1",le="{le}"}}': counted(count) for le in ("1", "+Inf")}
    series['seconds_count{v="1"}'] = counted(count)
    spread = 1.959964 * math.sqrt(0.95 * 0.05 / count)
    expected = (0.95, max(0.0, 0.95 - spread), min(1.0, 0.95 + spread))
    for expr, end in zip((interval.value, interval.low, interval.high), expected, strict=True):
        shows(expr.replace("$__range", "1h"), series, {'{v="1"}': end})


REQUESTS = 'svc_requests_total{model="tiny",version="1",route="r",status="200"}'
ERRORS = 'svc_request_errors_total{{model="tiny",version="1",reason="{}"}}'


@pytest.mark.parametrize("reason", ["invalid_request", "context_length_exceeded", "body_too_large", "client_gone"])
def test_what_a_client_did_wrong_is_not_the_versions_error(shows: Shows, reason: str) -> None:
    series = {REQUESTS: counted(600), ERRORS.format(reason): counted(300)}
    shows(query("Error share of A"), series, {'{version="1"}': 0})


@pytest.mark.parametrize("reason", ["engine_died", "engine_timeout", "engine_error", "internal_error", "overloaded"])
def test_a_fault_of_the_server_is_the_versions_error(shows: Shows, reason: str) -> None:
    series = {REQUESTS: counted(600), ERRORS.format(reason): counted(60)}
    shows(query("Error share of A"), series, {'{version="1"}': 0.1})


def test_errors_of_another_version_are_not_this_ones(shows: Shows) -> None:
    series = {REQUESTS: counted(600), ERRORS.format("engine_died").replace('"1"', '"2"'): counted(60)}
    shows(query("Error share of A"), series, {'{version="1"}': 0})


@pytest.mark.parametrize("panel", ["Error share of A", "Duration of A, p95", "First token of A, p95"])
def test_a_figure_in_the_time_shown_stands_between_the_ends_of_its_interval(shows: Shows, panel: str) -> None:
    series = {REQUESTS: counted(600), ERRORS.format("engine_died"): counted(60)}
    for histogram in ("svc_request_duration_seconds", "svc_time_to_first_token_seconds"):
        labels = 'model="tiny",version="1"'
        for le, count in (("1.0", 300), ("2.0", 600), ("+Inf", 600)):
            series[f'{histogram}_bucket{{{labels},le="{le}"}}'] = counted(count)
        series[f"{histogram}_count{{{labels}}}"] = counted(600)
    value, low, high = (query(panel, index) for index in range(3))
    shows(f"({low}) < bool ({value})", series, {'{version="1"}': 1})
    shows(f"({value}) < bool ({high})", series, {'{version="1"}': 1})


def judged(version: str, heldout: str, suffix: str = "") -> str:
    labels = f'model="tiny",version="{version}",heldout="{heldout}",format="merged",metric="exact_match",primary="true"'
    return f"svc_registry_version_evaluation{suffix}{{{labels}}}"


@pytest.mark.parametrize(("index", "suffix"), enumerate(["", "_low", "_high"]))
def test_only_versions_that_were_judged_on_the_chosen_set_are_compared(shows: Shows, index: int, suffix: str) -> None:
    series = {judged("1", CHOSEN, suffix): "0.5x60", judged("2", OTHER, suffix): "0.75x60"}
    shows(query("Answers", index), series, {'{version="1",format="merged",metric="exact_match"}': 0.5})


def test_the_sets_to_choose_from_are_those_of_the_two_versions(shows: Shows) -> None:
    series = {judged("1", CHOSEN): "1x60", judged("2", OTHER): "1x60", judged("3", "aaaaaaaaaaaa:4"): "1x60"}
    shows(query("variable heldout"), series, {f'{{heldout="{heldout}"}}': 1 for heldout in (CHOSEN, OTHER)})


def test_good_feedback_stands_between_the_ends_of_its_interval(shows: Shows) -> None:
    feedback = 'svc_feedback_total{{model="tiny",version="1",rating="{}"}}'
    series = {feedback.format("good"): "3x60", feedback.format("bad"): "1x60"}
    for index, end in enumerate(ends(proportion(3, 4)), start=1):
        shows(query("Good feedback", index), series, {'{version="1"}': end})
