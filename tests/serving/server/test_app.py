"""Tests which paths exist, and the headers common to all responses."""

import asyncio
import re

import httpx
import pytest

from serving.models.router import Router
from tests.serving.service import CHAT, NAME, TWO, Service, closed

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


async def test_models_are_listed_under_each_of_their_names(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/v1/models")).json()
    assert answer["object"] == "list"
    assert [model["id"] for model in answer["data"]] == [NAME, f"{NAME}@1", f"{NAME}@production"]
    assert all(set(model) == {"id", "object", "created", "owned_by"} for model in answer["data"])


async def test_model_is_retrieved_by_name(client: httpx.AsyncClient) -> None:
    answer = await client.get(f"/v1/models/{NAME}@1")
    assert answer.json() == {"id": f"{NAME}@1", "object": "model", "created": 1_700_000_000, "owned_by": "tuneserve"}


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_unknown_model_returns_404(client: httpx.AsyncClient, method: str) -> None:
    for name in ("other", "a%2Fb", "a/b", f"{NAME}@9"):
        answer = await client.request(method, f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), name


async def test_deleting_a_served_model_is_refused(client: httpx.AsyncClient) -> None:
    for name in (NAME, f"{NAME}@1", f"{NAME}@production"):
        answer = await client.delete(f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_not_deletable"), name
        assert (await client.get(f"/v1/models/{name}")).status_code == 200


async def test_health_endpoint_reflects_the_engine_state(service: Service, client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).status_code == 200
    service.admission.unavailable("the engine is starting")
    answer = await client.get("/health")
    assert (answer.status_code, answer.json()["reason"]) == (503, "the engine is starting")
    assert "retry-after" in answer.headers


async def test_server_is_live_even_if_its_engine_is_down(service: Service, client: httpx.AsyncClient) -> None:
    service.admission.unavailable("the engine is starting")
    answer = await client.get("/health/live")
    assert (answer.status_code, answer.json()) == (200, {"status": "live"})


async def test_service_stays_healthy_during_a_swap(service: Service, client: httpx.AsyncClient) -> None:
    async with closed(service.admission):
        assert (await client.get("/health")).status_code == 200


async def test_metrics_are_plain_text_or_openmetrics_as_requested(client: httpx.AsyncClient) -> None:
    plain = await client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert 'svc_requests_running{model="tuned"} 0.0' in plain.text
    openmetrics = await client.get("/metrics", headers={"accept": OPENMETRICS})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


async def test_version_is_dropped_from_metrics_once_it_is_neither_served_nor_requested(
    service: Service, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.telemetry.metrics.IDLE_VERSION_TIMEOUT_S", 0.01)
    requests = 'svc_requests_total{model="tuned",outcome="complete",route="/v1/chat/completions",status="200",version='
    await client.post("/v1/chat/completions", json=CHAT)
    service.load(TWO)
    await client.post("/v1/chat/completions", json=CHAT)
    await client.get("/metrics")
    await asyncio.sleep(0.02)
    page = (await client.get("/metrics")).text
    assert (f'{requests}"1"' in page, f'{requests}"2"' in page) == (False, True)


async def test_status_endpoint_returns_the_server_status_as_json(service: Service, client: httpx.AsyncClient) -> None:
    assert (await client.get("/svc/status")).json() == {"served": str(service.names.served)}


async def test_unknown_paths_return_404(service: Service, client: httpx.AsyncClient) -> None:
    for path in ("/", "/v1", "/v1/", "/v1/chat/completions/", "/detokenize", "//v1/models", "/health/"):
        for method in ("GET", "POST"):
            answer = await client.request(method, f"http://localhost{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
    assert service.double.calls == []


async def test_unsupported_method_returns_405_in_the_api_error_format(client: httpx.AsyncClient) -> None:
    for method, path in (("GET", "/v1/chat/completions"), ("POST", "/health"), ("PUT", "/metrics")):
        answer = await client.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
        assert answer.headers["allow"]


async def test_cross_origin_requests_get_no_cors_headers(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/models", headers={"origin": "http://elsewhere"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_every_response_includes_request_id_and_version(client: httpx.AsyncClient) -> None:
    for path in ("/health", "/v1/models/none", "/nothing", "/v1/completions"):
        answer = await client.get(path)
        assert re.fullmatch(r"req-[0-9a-f]{32}", answer.headers["x-request-id"])
        assert answer.headers["x-model-version"] == f"{NAME}@1"


@pytest.mark.parametrize("header", ["x-request-id", "x-client-request-id"])
async def test_client_request_id_is_returned_but_not_sent_to_the_engine(
    service: Service, client: httpx.AsyncClient, header: str
) -> None:
    answer = await client.post("/v1/chat/completions", json=CHAT, headers={header: "Mine_1.2-3"})
    assert answer.headers["x-client-request-id"] == "Mine_1.2-3"
    assert service.double.request_ids == [answer.headers["x-request-id"]]
    assert answer.headers["x-request-id"].startswith("req-")


async def test_client_request_id_is_dropped_if_unsafe_to_log(client: httpx.AsyncClient) -> None:
    for unsafe in (b"", b"a b", b"x" * 129, b"a\tb", "é".encode(), b"a;b"):
        answer = await client.get("/health", headers=[(b"x-request-id", unsafe)])
        assert "x-client-request-id" not in answer.headers, unsafe


async def test_internal_failure_returns_500_and_is_logged(
    service: Service, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Router, model: str, who: str = "") -> None:
        raise ZeroDivisionError("in /root/secret.py")

    monkeypatch.setattr(Router, "find", broken)
    for answer in (
        await client.post("/v1/chat/completions", json=CHAT),
        await client.get("/v1/models/x"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert answer.headers["x-should-retry"] == "false"
        assert "secret" not in answer.text
    assert caplog.text.count("Traceback") == 2
    assert service.admission.running == 0
