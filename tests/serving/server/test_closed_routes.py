"""Tests that all vLLM routes we do not offer are closed, especially those that change the engine's state."""

import httpx
import pytest

from tests.builders.routes import CLOSED, OURS
from tests.serving.service import Service


@pytest.mark.slow
async def test_vllm_routes_not_exposed_by_the_gateway_return_404_or_405(
    service: Service, client: httpx.AsyncClient
) -> None:
    closed, answered = {(404, "not_found"), (405, "method_not_allowed")}, []
    for route in CLOSED:
        method, path = route.split()
        for url in (path, f"{path}/", f"/{path}", path.replace("/", "/./", 1)):
            answer = await client.request(method, f"http://localhost{url}", json={})
            if (answer.status_code, answer.json()["error"]["code"]) not in closed or not answer.headers["x-request-id"]:
                answered.append(f"{method} {url}: {answer.status_code} {answer.text}")
    assert answered == []
    assert service.double.calls == []


async def test_unsupported_methods_are_rejected_on_exposed_paths(service: Service, client: httpx.AsyncClient) -> None:
    for route in OURS:
        allowed, path = route.split()
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - {allowed}:
            assert (await client.request(method, path)).status_code == 405
    assert service.double.calls == []
