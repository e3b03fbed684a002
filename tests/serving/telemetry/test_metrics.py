"""Tests what is counted and with which labels, and that clients cannot create series."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from serving.protocols.error_code import ErrorCode
from serving.protocols.route import Route
from serving.protocols.wire_formats import Usage
from serving.telemetry.metrics import IDLE_VERSION_TIMEOUT_S, GatewayMetrics
from svc.store.feedback import Rating
from svc.version import Format, Target, VersionId
from tests.builders.clocks import Clock
from tests.serving.service import NAME, ONE, TWO

MANY = [Target(VersionId(NAME, number), Format.ADAPTER) for number in range(1, 301)]


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry, clock: Clock) -> GatewayMetrics:
    return GatewayMetrics(registry, clock=clock)


def stream(metrics: GatewayMetrics, served: Target) -> None:
    """Count one streamed answer, a rating for it, and one failure."""
    observe = metrics.between_tokens(served)
    metrics.first_token(served, 0.1)
    observe(0.01)
    metrics.tokens(served, Usage(prompt=5, completion=2))
    metrics.request_ended(served, Route.COMPLETIONS, 200, 0.2)
    metrics.feedback_given(served.version, Rating.GOOD)
    metrics.request_failed(served, ErrorCode.ENGINE_DIED)
    metrics.request_ended(served, Route.COMPLETIONS, 503, 0.2, reason=ErrorCode.ENGINE_DIED)


def shown_versions(registry: CollectorRegistry) -> set[str]:
    """Return the versions that have at least one series."""
    samples = (sample for family in registry.collect() for sample in family.samples)
    return {version for sample in samples if (version := sample.labels.get("version"))}


def requests_of(registry: CollectorRegistry, served: Target) -> float | None:
    labels = {"route": "/v1/completions", "status": "200", "outcome": "complete"}
    labels |= {"model": NAME, "version": str(served.version.number)}
    return registry.get_sample_value("svc_requests_total", labels)


def test_requests_without_a_known_model_are_counted_under_unknown(
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


def test_failed_requests_are_excluded_from_the_measured_durations(
    registry: CollectorRegistry, metrics: GatewayMetrics
) -> None:
    metrics.request_ended(ONE, Route.COMPLETIONS, 503, 0.001, reason=ErrorCode.ENGINE_DIED)
    metrics.request_ended(ONE, Route.COMPLETIONS, 200, 1.0)
    labels = {"model": "tuned", "version": "1", "route": "/v1/completions"}
    assert registry.get_sample_value("svc_request_duration_seconds_count", labels) == 1
    quantile = {"model": "tuned", "version": "1", "quantile": "0.5"}
    assert registry.get_sample_value("svc_request_duration_quantile_seconds", quantile) == pytest.approx(1.0, rel=0.011)


def test_prompt_and_answer_tokens_are_counted_separately(registry: CollectorRegistry, metrics: GatewayMetrics) -> None:
    metrics.tokens(ONE, Usage(prompt=5, completion=7))
    for direction, count in (("in", 5), ("out", 7)):
        labels = {"model": "tuned", "version": "1", "direction": direction}
        assert registry.get_sample_value("svc_tokens_total", labels) == count


def test_error_series_of_a_version_starts_at_zero_before_the_first_error(
    registry: CollectorRegistry, metrics: GatewayMetrics
) -> None:
    metrics.show_errors(ONE)
    for model, version in (("unknown", ""), ("tuned", "1")):
        labels = {"model": model, "version": version, "reason": "engine_died"}
        assert registry.get_sample_value("svc_request_errors_total", labels) == 0


def test_error_is_counted_for_the_requested_version(registry: CollectorRegistry, metrics: GatewayMetrics) -> None:
    metrics.show_errors(TWO)
    metrics.request_failed(TWO, ErrorCode.ENGINE_DIED)
    counts = [
        registry.get_sample_value("svc_request_errors_total", {"model": m, "version": v, "reason": "engine_died"})
        for m, v in (("tuned", "2"), ("unknown", ""))
    ]
    assert counts == [1, 0]


def test_error_series_of_a_model_starts_at_zero_before_a_version_is_loaded(
    registry: CollectorRegistry, metrics: GatewayMetrics
) -> None:
    metrics.show_errors(None, "tuned")
    labels = {"model": "tuned", "version": "", "reason": "engine_unavailable"}
    assert registry.get_sample_value("svc_request_errors_total", labels) == 0


def test_error_without_a_version_is_counted_for_its_model(registry: CollectorRegistry, metrics: GatewayMetrics) -> None:
    metrics.request_failed(None, ErrorCode.QUEUE_OVERFLOW, "tuned")
    labels = {"model": "tuned", "version": "", "reason": "queue_overflow"}
    assert registry.get_sample_value("svc_request_errors_total", labels) == 1


def test_error_without_a_model_is_counted_with_unknown_as_its_model(
    registry: CollectorRegistry, metrics: GatewayMetrics
) -> None:
    metrics.request_failed(None, ErrorCode.BODY_TIMEOUT)
    labels = {"model": "unknown", "version": "", "reason": "body_timeout"}
    assert registry.get_sample_value("svc_request_errors_total", labels) == 1


@pytest.mark.slow
def test_metric_series_of_300_versions_are_removed_after_a_day_without_requests(
    registry: CollectorRegistry, metrics: GatewayMetrics, clock: Clock
) -> None:
    empty = len(generate_latest(registry))
    for served in MANY:
        metrics.show_errors(served)
        stream(metrics, served)
    metrics.remove_idle([])
    assert len(generate_latest(registry)) > 1_000_000
    clock.now += IDLE_VERSION_TIMEOUT_S
    metrics.remove_idle([])
    assert shown_versions(registry) == set()
    assert len(generate_latest(registry)) == empty


def test_served_version_stays_in_the_metrics_after_days_without_requests(
    registry: CollectorRegistry, metrics: GatewayMetrics, clock: Clock
) -> None:
    metrics.show_errors(ONE)
    for _ in range(10):
        clock.now += IDLE_VERSION_TIMEOUT_S
        metrics.remove_idle([ONE.version])
    assert shown_versions(registry) == {"1"}


def test_unserved_version_stays_in_the_metrics_until_a_day_after_its_last_request(
    registry: CollectorRegistry, metrics: GatewayMetrics, clock: Clock
) -> None:
    stream(metrics, ONE)
    stream(metrics, TWO)
    metrics.remove_idle([])
    clock.now += IDLE_VERSION_TIMEOUT_S - 1
    stream(metrics, TWO)
    metrics.remove_idle([])
    assert shown_versions(registry) == {"1", "2"}
    clock.now += 1
    metrics.remove_idle([])
    assert shown_versions(registry) == {"2"}
    assert requests_of(registry, TWO) == 2


def test_errors_not_attributed_to_a_version_stay_in_the_metrics_after_an_idle_day(
    registry: CollectorRegistry, metrics: GatewayMetrics, clock: Clock
) -> None:
    metrics.request_failed(None, ErrorCode.ENGINE_UNAVAILABLE, NAME)
    metrics.remove_idle([])
    clock.now += IDLE_VERSION_TIMEOUT_S
    metrics.remove_idle([])
    labels = {"model": NAME, "version": "", "reason": "engine_unavailable"}
    assert registry.get_sample_value("svc_request_errors_total", labels) == 1


def test_counters_restart_at_zero_if_a_version_is_requested_after_its_series_were_removed(
    registry: CollectorRegistry, metrics: GatewayMetrics, clock: Clock
) -> None:
    stream(metrics, ONE)
    stream(metrics, ONE)
    metrics.remove_idle([])
    clock.now += IDLE_VERSION_TIMEOUT_S
    metrics.remove_idle([])
    stream(metrics, ONE)
    assert requests_of(registry, ONE) == 1


def test_tokens_of_a_running_stream_are_counted_even_after_a_day_without_requests(
    registry: CollectorRegistry, metrics: GatewayMetrics, clock: Clock
) -> None:
    stream(metrics, ONE)
    metrics.remove_idle([])
    clock.now += IDLE_VERSION_TIMEOUT_S
    observe = metrics.between_tokens(ONE)
    metrics.remove_idle([])
    observe(0.01)
    name, labels = "svc_time_between_tokens_seconds_count", {"model": NAME, "version": "1"}
    assert registry.get_sample_value(name, labels) == 2


def test_ratings_of_an_unserved_version_stay_in_the_metrics_for_a_day(
    registry: CollectorRegistry, metrics: GatewayMetrics, clock: Clock
) -> None:
    metrics.feedback_given(ONE.version, Rating.BAD)
    metrics.remove_idle([])
    labels = {"model": NAME, "version": "1", "rating": "bad"}
    assert registry.get_sample_value("svc_feedback_total", labels) == 1
    clock.now += IDLE_VERSION_TIMEOUT_S
    metrics.remove_idle([])
    assert shown_versions(registry) == set()
