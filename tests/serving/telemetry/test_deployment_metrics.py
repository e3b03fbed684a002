"""Tests the metrics of each model: its engines, swaps and queues."""

import pytest
from prometheus_client import CollectorRegistry

from serving.telemetry.deployment_metrics import DeploymentInstruments, DeploymentMetrics
from svc.engine.state import EngineState
from svc.store.swaps import SwapOutcome, SwapResult
from svc.version import Format, Target, VersionId
from tests.serving.service import NAME, ONE, TWO


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def instruments(registry: CollectorRegistry) -> DeploymentInstruments:
    return DeploymentInstruments(registry)


@pytest.fixture
def metrics(instruments: DeploymentInstruments) -> DeploymentMetrics:
    return DeploymentMetrics(instruments, NAME)


def test_engines_are_counted_by_state(registry: CollectorRegistry, metrics: DeploymentMetrics) -> None:
    ready, swapping = EngineState.READY, EngineState.SWAPPING
    for states in ([ready], [ready, swapping, ready], []):
        metrics.engine_states(states)
        shown = {
            state: registry.get_sample_value("svc_engine_state", {"model": NAME, "state": state.value})
            for state in EngineState
        }
        assert shown == {state: states.count(state) for state in EngineState}


def test_only_the_loaded_version_is_shown_in_the_metrics(
    registry: CollectorRegistry, metrics: DeploymentMetrics
) -> None:
    metrics.version_loaded(ONE)
    metrics.version_loaded(TWO)
    (family,) = [family for family in registry.collect() if family.name == "svc_model_version_info"]
    assert [sample.labels for sample in family.samples] == [{"model": "tuned", "version": "2", "format": "gptq"}]


def test_swap_metrics_include_the_duration_and_the_number_of_queued_requests(
    registry: CollectorRegistry, metrics: DeploymentMetrics
) -> None:
    metrics.swap_ended(SwapResult(SwapOutcome.SUCCEEDED, None, queued_s=1.5, running=3, queued=12))
    outcome = {"model": NAME, "outcome": SwapOutcome.SUCCEEDED.value}
    assert registry.get_sample_value("svc_swaps_total", outcome) == 1
    assert registry.get_sample_value("svc_swap_duration_seconds_sum", outcome) == 1.5
    assert registry.get_sample_value("svc_swap_queued_requests_sum", {"model": NAME}) == 12


def test_refused_swap_that_queued_no_requests_is_not_in_the_queued_requests_metric(
    registry: CollectorRegistry, metrics: DeploymentMetrics
) -> None:
    metrics.swap_ended(SwapResult(SwapOutcome.REFUSED, "other shapes"))
    assert registry.get_sample_value("svc_swaps_total", {"model": NAME, "outcome": SwapOutcome.REFUSED.value}) == 1
    assert registry.get_sample_value("svc_swap_queued_requests_count", {"model": NAME}) is None


def test_time_between_held_out_evaluations_is_exported_for_at_most_one_version(
    registry: CollectorRegistry, metrics: DeploymentMetrics
) -> None:
    def due(version: str) -> float | None:
        return registry.get_sample_value("svc_holdout_interval_seconds", {"model": "tuned", "version": version})

    assert (due("1"), due("2")) == (None, None)
    metrics.holdout_due(ONE, 60.0)
    assert (due("1"), due("2")) == (60.0, None)
    metrics.holdout_due(TWO, 60.0)
    assert (due("1"), due("2")) == (None, 60.0)
    metrics.holdout_due(None, 60.0)
    assert (due("1"), due("2")) == (None, None)


def test_admission_counts_are_read_at_each_scrape(registry: CollectorRegistry, metrics: DeploymentMetrics) -> None:
    numbers = [1, 2]
    metrics.watch_admission(lambda: numbers[0], lambda: numbers[1])
    numbers[:] = [3, 4]
    assert registry.get_sample_value("svc_requests_running", {"model": NAME}) == 3
    assert registry.get_sample_value("svc_requests_queued", {"model": NAME}) == 4


def test_each_model_has_its_own_metric_series(
    registry: CollectorRegistry, instruments: DeploymentInstruments, metrics: DeploymentMetrics
) -> None:
    other = DeploymentMetrics(instruments, "other")
    metrics.version_loaded(ONE)
    other.version_loaded(Target(VersionId("other", 7), Format.GPTQ))
    metrics.engine_restarted()
    (family,) = [family for family in registry.collect() if family.name == "svc_model_version_info"]
    assert {(sample.labels["model"], sample.labels["version"]) for sample in family.samples} == {
        (NAME, "1"),
        ("other", "7"),
    }
    restarts = [registry.get_sample_value("svc_engine_restarts_total", {"model": name}) for name in (NAME, "other")]
    assert restarts == [1, 0]


def test_removing_a_model_removes_its_gauges_and_keeps_its_counters(
    registry: CollectorRegistry, metrics: DeploymentMetrics
) -> None:
    metrics.version_loaded(ONE)
    metrics.holdout_due(ONE, 60.0)
    metrics.watch_admission(lambda: 1, lambda: 2)
    metrics.engine_states([EngineState.READY])
    metrics.engine_restarted()
    metrics.remove()
    shown = {family.name for family in registry.collect() if family.samples and family.type == "gauge"}
    assert shown == set()
    assert registry.get_sample_value("svc_engine_restarts_total", {"model": NAME}) == 1
