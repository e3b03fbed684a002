"""The values of the comparison of two versions for given series, computed by Prometheus."""

import math
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from svc.evaluation.intervals import Interval, proportion
from tests.monitoring.panel_queries import panel_queries

ROOT = Path(__file__).parents[2]
PROMTOOL = ROOT / ".venv" / "prometheus" / "bin" / "promtool"
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
HOUR = 60  # samples, one per minute

Shows = Callable[[str, Mapping[str, str], Mapping[str, float]], None]


@pytest.fixture
def shows(tmp_path: Path) -> Shows:
    """Assert the results of a query after an hour of series, rounded to four digits."""

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
    """Return a query of a panel of the comparison, without variables."""
    return [query.expr for query in QUERIES if (query.dashboard, query.panel) == ("versions", panel)][index]


def counted(count: int) -> str:
    """Return a counter that reaches a count in an hour of equal steps, so that its increase is exact."""
    return f"0+{count / HOUR}x{HOUR}"


def ends(estimate: Interval) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


REQUESTS = 'svc_requests_total{model="tiny",version="1",route="r",status="200"}'
ERRORS = 'svc_request_errors_total{{model="tiny",version="1",reason="{}"}}'


@pytest.mark.parametrize("reason", ["invalid_request", "context_length_exceeded", "body_too_large", "client_gone"])
def test_a_client_error_does_not_count_as_an_error_of_the_version(shows: Shows, reason: str) -> None:
    series = {REQUESTS: counted(600), ERRORS.format(reason): counted(300)}
    shows(query("Error share of A"), series, {'{version="1"}': 0})


@pytest.mark.parametrize("reason", ["engine_died", "engine_timeout", "engine_error", "internal_error", "overloaded"])
def test_a_fault_of_the_server_counts_as_an_error_of_the_version(shows: Shows, reason: str) -> None:
    series = {REQUESTS: counted(600), ERRORS.format(reason): counted(60)}
    shows(query("Error share of A"), series, {'{version="1"}': 0.1})


def test_errors_of_another_version_do_not_count(shows: Shows) -> None:
    series = {REQUESTS: counted(600), ERRORS.format("engine_died").replace('"1"', '"2"'): counted(60)}
    shows(query("Error share of A"), series, {'{version="1"}': 0})


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize(("errors", "requests"), [(0, 40), (3, 40), (40, 40), (5, 4)])
def test_error_share_has_the_interval_that_evaluations_have_when_errors_are_counted(
    shows: Shows, side: str, errors: int, requests: int
) -> None:
    """Increases are extrapolated, so there may be more errors than requests; the share is then 1."""
    version = {"A": "1", "B": "2"}[side]
    series = {REQUESTS: counted(requests), ERRORS.format("engine_died"): counted(errors)}
    series = {name.replace('version="1"', f'version="{version}"'): values for name, values in series.items()}
    expected = proportion(min(errors, requests), requests)
    for index, end in enumerate(ends(expected)):
        shows(query(f"Error share of {side}", index), series, {f'{{version="{version}"}}': end})


@pytest.mark.parametrize("panel", ["Duration", "First token"])
@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("count", [6, 600])
def test_p95_has_the_interval_of_its_rank_when_all_values_are_in_one_bucket(
    shows: Shows, panel: str, side: str, count: int
) -> None:
    """With one bucket from 0 to 1, a quantile is its own rank."""
    histogram = {"Duration": "svc_request_duration_seconds", "First token": "svc_time_to_first_token_seconds"}[panel]
    version = {"A": "1", "B": "2"}[side]
    labels = f'model="tiny",version="{version}"'
    series = {f'{histogram}_bucket{{{labels},le="{le}"}}': counted(count) for le in ("1", "+Inf")}
    series[f"{histogram}_count{{{labels}}}"] = counted(count)
    spread = 1.959964 * math.sqrt(0.95 * 0.05 / count)
    for index, end in enumerate((0.95, max(0.0, 0.95 - spread), min(1.0, 0.95 + spread))):
        shows(query(f"{panel} of {side}, p95", index), series, {f'{{version="{version}"}}': end})


def judged(version: str, heldout: str, suffix: str = "") -> str:
    labels = f'model="tiny",version="{version}",heldout="{heldout}",format="merged",metric="exact_match",primary="true"'
    return f"svc_registry_version_evaluation{suffix}{{{labels}}}"


@pytest.mark.parametrize(("index", "suffix"), enumerate(["", "_low", "_high"]))
def test_only_versions_evaluated_on_the_chosen_set_are_compared(shows: Shows, index: int, suffix: str) -> None:
    series = {judged("1", CHOSEN, suffix): "0.5x60", judged("2", OTHER, suffix): "0.75x60"}
    shows(query("Answers", index), series, {'{version="1",format="merged",metric="exact_match"}': 0.5})


def test_the_sets_to_choose_from_are_those_of_the_two_versions(shows: Shows) -> None:
    series = {judged("1", CHOSEN): "1x60", judged("2", OTHER): "1x60", judged("3", "aaaaaaaaaaaa:4"): "1x60"}
    shows(query("variable heldout"), series, {f'{{heldout="{heldout}"}}': 1 for heldout in (CHOSEN, OTHER)})


@pytest.mark.parametrize(("good", "bad"), [(0, 4), (3, 1), (4, 0)])
def test_good_feedback_has_the_interval_that_evaluations_have_when_answers_are_rated(
    shows: Shows, good: int, bad: int
) -> None:
    feedback = 'svc_feedback_total{{model="tiny",version="1",rating="{}"}}'
    series = {feedback.format("good"): f"{good}x60", feedback.format("bad"): f"{bad}x60"}
    for index, end in enumerate(ends(proportion(good, good + bad)), start=1):
        shows(query("Good feedback", index), series, {'{version="1"}': end})
