"""Tests that status figures equal those the server exports, whatever else its metrics page contains."""

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from monitoring.status.figures import QUANTILES, Figures, Rate, VersionFigures, rates_between, read_figures
from serving.protocols.error_code import ErrorCode
from serving.protocols.route import Route
from serving.protocols.wire_formats import Usage
from serving.telemetry.metrics import GatewayMetrics
from svc.version import Format, Target, VersionId

ONE, TWO = (Target(VersionId("tiny", number), Format.GPTQ) for number in (1, 2))
Read = Callable[[], Figures]


@pytest.fixture
def traffic() -> GatewayMetrics:
    """Return the metric instruments of a server that has just started."""
    return GatewayMetrics(CollectorRegistry())


@pytest.fixture
def read(traffic: GatewayMetrics) -> Read:
    return lambda: read_figures(generate_latest(traffic.registry).decode())


def test_status_statistics_are_empty_when_the_server_has_just_started(read: Read) -> None:
    assert read() == Figures({}, {})


def test_status_statistics_are_empty_if_the_metrics_page_is_empty() -> None:
    assert read_figures("") == Figures({}, {})


def test_requests_are_summed_over_all_routes_and_statuses(traffic: GatewayMetrics, read: Read) -> None:
    traffic.request_ended(ONE, Route.CHAT_COMPLETIONS, 200, 0.1)
    traffic.request_ended(ONE, Route.CHAT_COMPLETIONS, 200, 0.1)
    traffic.request_ended(ONE, Route.COMPLETIONS, 200, 0.1)
    traffic.request_ended(ONE, Route.CHAT_COMPLETIONS, 400, 0.1, reason=ErrorCode.INVALID_REQUEST)
    traffic.request_ended(ONE, Route.CHAT_COMPLETIONS, 503, 0.1, reason=ErrorCode.ENGINE_UNAVAILABLE)
    assert read().versions["tiny@1"].requests == 5


def test_server_fault_counts_as_a_version_error_even_in_the_middle_of_a_stream(
    traffic: GatewayMetrics, read: Read
) -> None:
    traffic.request_ended(ONE, Route.CHAT_COMPLETIONS, 200, 0.1)
    traffic.request_failed(ONE, ErrorCode.ENGINE_DIED)
    assert read().versions["tiny@1"].errors == 1


def test_client_error_does_not_count_as_a_version_error(traffic: GatewayMetrics, read: Read) -> None:
    traffic.request_ended(ONE, Route.CHAT_COMPLETIONS, 400, 0.1, reason=ErrorCode.INVALID_REQUEST)
    for code in (
        ErrorCode.INVALID_REQUEST,
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        ErrorCode.CLIENT_GONE,
        ErrorCode.BODY_TIMEOUT,
    ):
        traffic.request_failed(ONE, code)
        assert read().versions["tiny@1"].errors == 0, code


def test_status_statistics_are_separate_for_each_version(traffic: GatewayMetrics, read: Read) -> None:
    traffic.request_ended(ONE, Route.CHAT_COMPLETIONS, 200, 0.1)
    traffic.request_ended(TWO, Route.CHAT_COMPLETIONS, 500, 0.1, reason=ErrorCode.ENGINE_ERROR)
    traffic.request_failed(TWO, ErrorCode.INTERNAL_ERROR)
    versions = read().versions
    assert {name: (figures.requests, figures.errors) for name, figures in versions.items()} == {
        "tiny@1": (1, 0),
        "tiny@2": (1, 1),
    }


def test_requests_without_a_version_are_not_attributed_to_any_version(traffic: GatewayMetrics, read: Read) -> None:
    traffic.request_ended(None, Route.CHAT_COMPLETIONS, 404, 0.1, reason=ErrorCode.MODEL_NOT_FOUND)
    assert read().versions == {}


def test_prompt_and_generated_tokens_are_counted_separately_in_the_status(traffic: GatewayMetrics, read: Read) -> None:
    traffic.tokens(ONE, Usage(prompt=30, completion=4))
    traffic.tokens(ONE, Usage(prompt=1, completion=2))
    figures = read().versions["tiny@1"]
    assert (figures.tokens_in, figures.tokens_out) == (31, 6)


def test_estimated_quantiles_are_close_to_the_quantiles_of_observed_times(traffic: GatewayMetrics, read: Read) -> None:
    for hundredth in range(1, 101):
        traffic.request_ended(ONE, Route.CHAT_COMPLETIONS, 200, hundredth / 100)
        traffic.first_token(ONE, hundredth / 1000)
    figures = read().versions["tiny@1"]
    assert list(figures.duration_s) == list(figures.first_token_s) == list(QUANTILES)
    assert list(figures.duration_s.values()) == pytest.approx([0.5, 0.95, 0.99], rel=0.05)
    assert list(figures.first_token_s.values()) == pytest.approx([0.05, 0.095, 0.099], rel=0.05)


def test_version_without_answers_in_the_window_has_no_quantiles(traffic: GatewayMetrics, read: Read) -> None:
    traffic.request_ended(ONE, Route.CHAT_COMPLETIONS, 500, 0.1, reason=ErrorCode.ENGINE_ERROR)
    assert read().versions["tiny@1"].duration_s == {}


def test_errors_are_counted_by_reason_and_zero_counts_are_omitted(traffic: GatewayMetrics, read: Read) -> None:
    traffic.request_failed(None, ErrorCode.INVALID_JSON)
    traffic.request_failed(None, ErrorCode.INVALID_JSON)
    assert read().errors == {"invalid_json": 2}


def test_errors_with_the_same_reason_are_summed_over_versions(traffic: GatewayMetrics, read: Read) -> None:
    for served in (None, ONE, TWO):
        traffic.request_failed(served, ErrorCode.ENGINE_DIED)
    assert read().errors == {"engine_died": 3}


def test_only_metrics_of_the_named_models_are_read(traffic: GatewayMetrics) -> None:
    other = Target(VersionId("other", 7), Format.GPTQ)
    for served, model in ((ONE, "tiny"), (other, "other"), (None, "other"), (None, "unknown")):
        traffic.request_ended(served, Route.CHAT_COMPLETIONS, 503, 0.1, reason=ErrorCode.ENGINE_DIED, model=model)
        traffic.request_failed(served, ErrorCode.ENGINE_DIED, model)
    page = generate_latest(traffic.registry).decode()
    figures = read_figures(page, ["other"])
    assert (set(figures.versions), figures.errors) == ({"other@7"}, {"engine_died": 2})
    assert set(read_figures(page, ["tiny", "other"]).versions) == {"tiny@1", "other@7"}
    assert read_figures(page, ["unserved"]) == Figures({}, {})


def test_loaded_version_without_requests_shows_zero_requests(traffic: GatewayMetrics, read: Read) -> None:
    traffic.show_errors(ONE)
    assert all(figures.requests == 0 for figures in read().versions.values())


def test_metrics_of_other_programs_are_ignored() -> None:
    page = '# TYPE vllm:requests counter\nvllm:requests_total{version="9",model="x"} 5\npython_info{major="3"} 1\n'
    assert all(figures.requests == 0 for figures in read_figures(page).versions.values())


def counted(**requests: int) -> Figures:
    versions = {name: VersionFigures(name, requests=count, tokens_out=10 * count) for name, count in requests.items()}
    return Figures(versions, {})


def test_rates_are_differences_between_readings_divided_by_elapsed_time() -> None:
    assert rates_between(counted(a=6), counted(a=10), 2.0) == {"a": Rate(2.0, 20.0)}


def test_earlier_counters_of_a_new_version_are_taken_as_zero_when_rates_are_computed() -> None:
    assert rates_between(counted(a=5), counted(a=5, b=4), 2.0) == {"a": Rate(0.0, 0.0), "b": Rate(2.0, 20.0)}


def test_no_rate_is_computed_between_readings_before_and_after_a_server_restart() -> None:
    assert rates_between(counted(a=500), counted(a=5), 2.0) == {}


def test_no_rate_is_shown_if_any_counter_decreased() -> None:
    before, now = (
        Figures({"a": VersionFigures("a", requests=requests, tokens_out=tokens)}, {})
        for requests, tokens in ((5, 500), (6, 60))
    )
    assert rates_between(before, now, 2.0) == {}
