"""Tests vLLM's own metrics on our page: labeled, with unchanged names in every format, and never blocking."""

from collections.abc import Callable

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from serving.telemetry.engine_metrics import EngineMetrics, EngineSource
from svc.engine.client import EngineClient
from tests.serving.service import CHAT, NAME, ONE, TWO, Service

PAGE = """# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tuned"} 3.0
# HELP vllm:lora_requests_info Running stats on LoRA requests.
# TYPE vllm:lora_requests_info gauge
vllm:lora_requests_info{max_lora="8",running_lora_adapters="tuned@1#ab",waiting_lora_adapters=""} 1790000000.0
# HELP vllm:prompt_tokens_total Tokens.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="tuned"} 42.0
# HELP vllm:prompt_tokens_created Tokens.
# TYPE vllm:prompt_tokens_created gauge
vllm:prompt_tokens_created{engine="0",model_name="tuned"} 1790000000.0
# HELP vllm:e2e_request_latency_seconds Latency.
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{engine="0",le="1.0",model_name="tuned"} 1.0
vllm:e2e_request_latency_seconds_bucket{engine="0",le="+Inf",model_name="tuned"} 2.0
vllm:e2e_request_latency_seconds_count{engine="0",model_name="tuned"} 2.0
vllm:e2e_request_latency_seconds_sum{engine="0",model_name="tuned"} 3.5
# HELP python_info Python.
# TYPE python_info gauge
python_info{version="3.11"} 1.0
"""
OPENMETRICS = {"accept": "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"}
"""Accept header sent by Prometheus 2.53, shortened."""


def client(reply: Callable[[httpx.Request], httpx.Response]) -> EngineClient:
    """Return a client for an engine that responds with the given reply."""
    return EngineClient(httpx.AsyncClient(transport=httpx.MockTransport(reply), base_url="http://engine"), NAME)


def metrics(*answers: httpx.Response | Exception) -> tuple[EngineMetrics, CollectorRegistry]:
    """Return the metrics of an engine that gives these responses in turn, and their registry."""
    coming = iter(answers)

    def reply(request: httpx.Request) -> httpx.Response:
        answer = next(coming)
        if isinstance(answer, Exception):
            raise answer
        return answer

    engine = client(reply)
    collector, registry = EngineMetrics(lambda: [EngineSource(engine, TWO, 0)]), CollectorRegistry()
    registry.register(collector)
    return collector, registry


async def test_each_engine_sample_has_model_and_version_labels() -> None:
    collector, registry = metrics(httpx.Response(200, text=PAGE))
    await collector.refresh()
    labels = {"engine": "0", "model_name": "tuned", "model": "tuned", "version": "2", "replica": "0"}
    assert registry.get_sample_value("vllm:num_requests_running", labels) == 3
    assert registry.get_sample_value("vllm:prompt_tokens_total", labels) == 42
    assert registry.get_sample_value("vllm:e2e_request_latency_seconds_bucket", {**labels, "le": "+Inf"}) == 2


async def test_adapter_names_do_not_create_separate_metric_series() -> None:
    collector, registry = metrics(httpx.Response(200, text=PAGE))
    await collector.refresh()
    assert b"lora_requests_info" not in generate_latest(registry)


async def test_engine_process_metrics_are_excluded() -> None:
    collector, registry = metrics(httpx.Response(200, text=PAGE))
    await collector.refresh()
    assert b"python_info" not in generate_latest(registry)


async def test_unresponsive_engine_exports_no_metrics() -> None:
    cases: list[httpx.Response | Exception] = [
        httpx.ConnectError("gone"),
        httpx.ReadTimeout("hangs"),
        httpx.Response(404),
        httpx.Response(200, text='vllm:cut_off{engine="0'),
    ]
    for answer in cases:
        collector, registry = metrics(httpx.Response(200, text=PAGE), answer)
        await collector.refresh()
        assert b"vllm:" in generate_latest(registry), answer
        await collector.refresh()
        assert generate_latest(registry) == b"", answer


async def test_engine_metrics_are_empty_before_an_engine_has_loaded_a_version() -> None:
    collector, registry = EngineMetrics(list), CollectorRegistry()
    registry.register(collector)
    await collector.refresh()
    assert generate_latest(registry) == b""


async def test_each_of_several_engines_has_its_own_series_in_one_metric_family() -> None:
    engine = client(lambda request: httpx.Response(200, text=PAGE))
    collector = EngineMetrics(lambda: [EngineSource(engine, ONE, 0), EngineSource(engine, TWO, 1)])
    await collector.refresh()
    (family,) = [family for family in collector.collect() if family.name == "vllm:prompt_tokens"]
    shown = {(sample.labels["version"], sample.labels["replica"]) for sample in family.samples}
    assert shown == {("1", "0"), ("2", "1")}


@pytest.mark.parametrize("headers", [{}, OPENMETRICS], ids=["text", "openmetrics"])
async def test_colon_in_metric_names_is_kept(
    service: Service, client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    service.double.metrics = PAGE
    page = (await client.get("/metrics", headers=headers)).text
    assert "vllm:prompt_tokens_total{" in page
    assert "vllm_" not in page


async def test_metrics_page_is_valid_for_a_strict_openmetrics_parser(
    service: Service, client: httpx.AsyncClient
) -> None:
    service.double.metrics = PAGE
    await client.post("/v1/chat/completions", json=CHAT)
    page = await client.get("/metrics", headers=OPENMETRICS)
    assert {family.name for family in text_string_to_metric_families(page.text)} > {"vllm:prompt_tokens"}  # type: ignore[no-untyped-call]
