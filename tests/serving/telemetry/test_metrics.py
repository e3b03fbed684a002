"""What is counted, under which labels, and that clients cannot make it grow."""

import pytest
from prometheus_client import CollectorRegistry

from serving.protocols.error_code import ErrorCode
from serving.protocols.route import Route
from serving.protocols.wire_formats import Usage
from serving.telemetry.metrics import GatewayMetrics
from tests.serving.service import ONE, TWO


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> GatewayMetrics:
    return GatewayMetrics(registry)


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
    metrics.show_errors(ONE)
    for model, version in (("unknown", ""), ("tuned", "1")):
        labels = {"model": model, "version": version, "reason": "engine_died"}
        assert registry.get_sample_value("svc_request_errors_total", labels) == 0


def test_an_error_is_counted_for_the_version_that_was_asked(
    registry: CollectorRegistry, metrics: GatewayMetrics
) -> None:
    metrics.show_errors(TWO)
    metrics.request_failed(TWO, ErrorCode.ENGINE_DIED)
    counts = [
        registry.get_sample_value("svc_request_errors_total", {"model": m, "version": v, "reason": "engine_died"})
        for m, v in (("tuned", "2"), ("unknown", ""))
    ]
    assert counts == [1, 0]


def test_every_reason_of_a_model_exists_before_a_version_is_loaded(
    registry: CollectorRegistry, metrics: GatewayMetrics
) -> None:
    metrics.show_errors(None, "tuned")
    labels = {"model": "tuned", "version": "", "reason": "engine_unavailable"}
    assert registry.get_sample_value("svc_request_errors_total", labels) == 0


def test_an_error_without_a_version_is_counted_for_the_model_that_was_asked(
    registry: CollectorRegistry, metrics: GatewayMetrics
) -> None:
    metrics.request_failed(None, ErrorCode.QUEUE_OVERFLOW, "tuned")
    labels = {"model": "tuned", "version": "", "reason": "queue_overflow"}
    assert registry.get_sample_value("svc_request_errors_total", labels) == 1


def test_an_error_without_a_model_is_counted_under_unknown(
    registry: CollectorRegistry, metrics: GatewayMetrics
) -> None:
    metrics.request_failed(None, ErrorCode.BODY_TIMEOUT)
    labels = {"model": "unknown", "version": "", "reason": "body_timeout"}
    assert registry.get_sample_value("svc_request_errors_total", labels) == 1
