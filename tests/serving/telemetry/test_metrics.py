"""What is counted, under which labels, and that clients cannot make it grow."""

import pytest
from prometheus_client import CollectorRegistry

from serving.protocols.error_code import ErrorCode
from serving.protocols.route import Route
from serving.protocols.wire_formats import Usage
from serving.telemetry.metrics import GatewayMetrics
from svc.engine.state import EngineState
from svc.store.swaps import SwapOutcome, SwapResult
from tests.serving.service import ONE, TWO


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> GatewayMetrics:
    return GatewayMetrics(registry)


def test_the_engines_in_each_state_are_counted(registry: CollectorRegistry, metrics: GatewayMetrics) -> None:
    ready, swapping = EngineState.READY, EngineState.SWAPPING
    for states in ([ready], [ready, swapping, ready], []):
        metrics.engine_states(states)
        shown = {state: registry.get_sample_value("svc_engine_state", {"state": state.value}) for state in EngineState}
        assert shown == {state: states.count(state) for state in EngineState}


def test_only_the_loaded_version_is_shown(registry: CollectorRegistry, metrics: GatewayMetrics) -> None:
    metrics.version_loaded(ONE)
    metrics.version_loaded(TWO)
    (family,) = [family for family in registry.collect() if family.name == "svc_model_version_info"]
    assert [sample.labels for sample in family.samples] == [{"model": "tuned", "version": "2", "format": "gptq"}]


def test_answers_without_a_version_are_counted_under_unknown(
    registry: CollectorRegistry, metrics: GatewayMetrics
) -> None:
    metrics.request_ended(None, Route.COMPLETIONS, 404, 0.1, reason=ErrorCode.MODEL_NOT_FOUND)
    labels = {
        "model": "unknown",
        "version": "",
        "route": "/v1/completions",
        "status": "404",
        "outcome": "refused",
    }
    assert registry.get_sample_value("svc_requests_total", labels) == 1


def test_errors_do_not_shorten_the_durations(registry: CollectorRegistry, metrics: GatewayMetrics) -> None:
    metrics.request_ended(ONE, Route.COMPLETIONS, 503, 0.001, reason=ErrorCode.ENGINE_DIED)
    metrics.request_ended(ONE, Route.COMPLETIONS, 200, 1.0)
    labels = {"model": "tuned", "version": "1", "route": "/v1/completions"}
    assert registry.get_sample_value("svc_request_duration_seconds_count", labels) == 1
    quantile = {"model": "tuned", "version": "1", "quantile": "0.5"}
    assert registry.get_sample_value("svc_request_duration_quantile_seconds", quantile) == pytest.approx(1.0, rel=0.011)


def test_tokens_are_counted_by_direction(registry: CollectorRegistry, metrics: GatewayMetrics) -> None:
    metrics.tokens(ONE, Usage(prompt=5, completion=7))
    for direction, count in (("in", 5), ("out", 7)):
        labels = {"model": "tuned", "version": "1", "direction": direction}
        assert registry.get_sample_value("svc_tokens_total", labels) == count


def test_every_reason_exists_before_it_happens(registry: CollectorRegistry, metrics: GatewayMetrics) -> None:
    metrics.version_loaded(ONE)
    for model, version in (("unknown", ""), ("tuned", "1")):
        labels = {"model": model, "version": version, "reason": "engine_died"}
        assert registry.get_sample_value("svc_request_errors_total", labels) == 0


def test_an_error_is_counted_for_the_version_that_was_asked(
    registry: CollectorRegistry, metrics: GatewayMetrics
) -> None:
    metrics.version_loaded(TWO)
    metrics.request_failed(TWO, ErrorCode.ENGINE_DIED)
    counts = [
        registry.get_sample_value("svc_request_errors_total", {"model": m, "version": v, "reason": "engine_died"})
        for m, v in (("tuned", "2"), ("unknown", ""))
    ]
    assert counts == [1, 0]


def test_an_error_without_a_version_is_counted_under_unknown(
    registry: CollectorRegistry, metrics: GatewayMetrics
) -> None:
    metrics.request_failed(None, ErrorCode.QUEUE_OVERFLOW)
    labels = {"model": "unknown", "version": "", "reason": "queue_overflow"}
    assert registry.get_sample_value("svc_request_errors_total", labels) == 1


def test_a_swap_is_counted_timed_and_its_held_requests_kept(
    registry: CollectorRegistry, metrics: GatewayMetrics
) -> None:
    metrics.swap_ended(SwapResult(SwapOutcome.SUCCEEDED, None, queued_s=1.5, running=3, queued=12))
    outcome = {"outcome": SwapOutcome.SUCCEEDED.value}
    assert registry.get_sample_value("svc_swaps_total", outcome) == 1
    assert registry.get_sample_value("svc_swap_duration_seconds_sum", outcome) == 1.5
    assert registry.get_sample_value("svc_swap_queued_requests_sum") == 12


def test_a_swap_that_was_refused_before_the_door_closed_is_not_timed(
    registry: CollectorRegistry, metrics: GatewayMetrics
) -> None:
    metrics.swap_ended(SwapResult(SwapOutcome.REFUSED, "other shapes"))
    assert registry.get_sample_value("svc_swaps_total", {"outcome": SwapOutcome.REFUSED.value}) == 1
    assert registry.get_sample_value("svc_swap_queued_requests_count") == 0


def test_the_held_out_set_is_due_of_one_version_at_most(registry: CollectorRegistry, metrics: GatewayMetrics) -> None:
    def due(version: str) -> float | None:
        return registry.get_sample_value("svc_holdout_interval_seconds", {"model": "tuned", "version": version})

    assert (due("1"), due("2")) == (None, None)
    metrics.holdout_due(ONE, 60.0)
    assert (due("1"), due("2")) == (60.0, None)
    metrics.holdout_due(TWO, 60.0)
    assert (due("1"), due("2")) == (None, 60.0)
    metrics.holdout_due(None, 60.0)
    assert (due("1"), due("2")) == (None, None)


def test_the_door_is_read_when_it_is_asked_for(registry: CollectorRegistry, metrics: GatewayMetrics) -> None:
    numbers = [1, 2]
    metrics.watch_admission(lambda: numbers[0], lambda: numbers[1])
    numbers[:] = [3, 4]
    assert registry.get_sample_value("svc_requests_running") == 3
    assert registry.get_sample_value("svc_requests_queued") == 4
