"""Tests `svc plan` without an engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from serving.sizing.plan import make_plan, predict
from serving.sizing.service_times import MeasuredTimes
from serving.sizing.simulation import Workload
from svc.cli import group
from svc.errors import SettingsError
from tests.serving.sizing.times import make_times

LOAD = Workload(50.0, prompt=100, answer=20)
EXAMPLE = ("--model", "8b", "--gpu", "h100", "--rps", "50", "--prompt", "800", "--answer", "200")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def svc_plan(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(group, ["--home", str(home), "plan", *arguments])


def plan_json(home: Path, *arguments: str) -> Any:
    return json.loads(svc_plan(home, *arguments, "--json").stdout)


@pytest.mark.slow
def test_plan_has_the_fewest_replicas_that_meet_the_latency_target() -> None:
    times = make_times(slope_s=0.002)
    plan = make_plan(LOAD, 0.6, times, 64, None, None)
    assert plan.replicas > 1
    assert plan.latency.p95 <= 0.6
    assert predict(LOAD, plan.replicas - 1, times, 64).p95 > 0.6


def test_latency_target_below_the_latency_of_an_idle_replica_is_rejected() -> None:
    with pytest.raises(SettingsError, match=r"0\.21 s on an idle replica"):
        make_plan(LOAD, 0.1, make_times(), 64, None, None)


@pytest.mark.slow
def test_planned_rollout_on_a_single_replica_delays_requests_by_the_reload_time() -> None:
    plan = make_plan(Workload(2.0, 100, 20), 1.0, make_times(), 64, None, reload_s=5.0)
    assert plan.replicas == 1
    assert 4.0 < plan.rollout.longest_wait_s < 6.0


@pytest.mark.slow
def test_plan_from_published_figures_is_labeled_as_unmeasured(home: Path) -> None:
    plan = plan_json(home, *EXAMPLE, "--p95", "2s")
    assert plan["times"].startswith("unmeasured")
    assert 2 <= plan["replicas"] <= 20
    assert plan["dollars_per_hour"] == pytest.approx(plan["replicas"] * 3.99)


@pytest.mark.slow
def test_price_option_overrides_the_listed_gpu_price(home: Path) -> None:
    plan = plan_json(home, *EXAMPLE, "--p95", "2s", "--price", "1")
    assert plan["dollars_per_hour"] == plan["replicas"]


@pytest.mark.slow
def test_plan_splits_a_model_across_gpus_if_it_does_not_fit_on_one(home: Path) -> None:
    plan = plan_json(home, "--model", "70b", "--gpu", "h100", "--rps", "1", "--p95", "60s")
    assert plan["gpus"] == 2
    assert not plan["memory"]["second_engine"]


@pytest.mark.slow
def test_plan_uses_and_cites_the_supplied_measurement(home: Path, tmp_path: Path) -> None:
    make_times().write(tmp_path / "times.json")
    arguments = ("--times", str(tmp_path / "times.json"), "--rps", "1", "--p95", "1s", "--prompt", "100")
    plan = plan_json(home, *arguments, "--answer", "20")
    assert plan["times"].startswith("measured: test")
    assert plan["warning"] is None


@pytest.mark.slow
def test_plan_warns_when_requests_are_longer_than_in_the_measurement(home: Path, tmp_path: Path) -> None:
    make_times().write(tmp_path / "times.json")
    result = svc_plan(home, "--times", str(tmp_path / "times.json"), "--rps", "1", "--p95", "10s", "--answer", "200")
    assert "measure again" in result.stderr


@pytest.mark.parametrize("content", ["{}", "[", '{"format": 2}'])
def test_invalid_measurement_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "times.json").write_text(content)
    with pytest.raises(SettingsError, match=r"times\.json"):
        MeasuredTimes.read(tmp_path / "times.json")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--rps", "1"),
        ("--rps", "1", "--p95", "1s"),
        (*EXAMPLE, "--p95", "soon"),
        (*EXAMPLE, "--p95", "0s"),
        ("--model", "8b", "--gpu", "h100", "--rps", "0", "--p95", "2s"),
        ("--model", "8b", "--gpu", "h100", "--rps", "nan", "--p95", "2s"),
        (*EXAMPLE, "--p95", "2s", "--spread", "nan"),
        (*EXAMPLE, "--p95", "2s", "--price", "inf"),
    ],
)
def test_incomplete_or_invalid_workload_options_cause_a_usage_error(home: Path, arguments: tuple[str, ...]) -> None:
    assert svc_plan(home, *arguments).exit_code == 2


def test_unknown_gpu_is_refused(home: Path) -> None:
    result = svc_plan(home, "--model", "8b", "--gpu", "tpu", "--rps", "1", "--p95", "9s")
    assert isinstance(result.exception, SettingsError)
    assert "h100" in result.exception.expected
