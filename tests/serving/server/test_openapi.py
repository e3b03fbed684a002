"""Tests that the OpenAPI document matches the server."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Required, get_origin, get_type_hints

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from prometheus_client import CollectorRegistry
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from sqlalchemy import Engine as Store

from serving.access.authenticator import Authenticator
from serving.access.keyring import Keyring
from serving.admission.admission import Admission
from serving.engines.balancer import Lease
from serving.engines.model_names import ModelNames
from serving.engines.token_pace import TokenPace
from serving.gateway.authentication import Authentication
from serving.protocols.error_code import ANSWERS, ErrorCode
from serving.protocols.route import Route
from serving.server.openapi import openapi_document
from serving.telemetry.metrics import GatewayMetrics
from svc.identity.principal import Limits, Scope
from svc.settings.client_apis import FilesSettings, FineTuningSettings
from svc.settings.serve import ServeSettings
from svc.settings.settings import Settings
from tests.builders.actors import ALICE
from tests.serving.engine_double import EngineDouble
from tests.serving.service import NAME, ONE, OneBackend, Service, connections, gateway
from tests.serving.socket_server import running_in_thread

EXAMPLES = min(30, settings().max_examples // 3)
EXAMPLES_WITH_KEYS = 3
OPEN = {"/health", "/health/live"}
"""Paths that nobody needs a key for."""
CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance, content_type_conformance]


def operations(app: FastAPI) -> set[tuple[str, str]]:
    """Return the methods and paths that the application responds to."""
    operations_of_app = set()
    for route in app.router.routes:
        path = str(getattr(route, "path", "")).replace(":path", "")
        operations_of_app |= {
            (method.lower(), path) for method in getattr(route, "methods", None) or () if method != "HEAD"
        }
    return operations_of_app


async def test_openapi_document_lists_exactly_the_served_paths(service: Service, client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    described = {(method, path) for path, methods in paths.items() for method in methods if method != "parameters"}
    assert described == operations(service.app.framework)


async def test_every_completion_error_is_documented_with_its_status(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    elsewhere = {ErrorCode.MODEL_NOT_DELETABLE, ErrorCode.CHANGE_CONFLICT, ErrorCode.CHANGE_REFUSED}
    elsewhere |= {ErrorCode.FILE_IN_USE, ErrorCode.DISK_FULL}
    statuses = {str(status) for status, code in ANSWERS.values() if code not in elsewhere} | {"500"}
    for route in Route:
        assert statuses <= set(document["paths"][route.value]["post"]["responses"])


@pytest.mark.slow
def test_openapi_document_requires_the_fields_official_clients_require() -> None:
    from anthropic.types import message_create_params
    from openai.types import chat, completion_create_params

    clients: dict[Route, Any] = {
        Route.CHAT_COMPLETIONS: chat.completion_create_params.CompletionCreateParamsNonStreaming,
        Route.COMPLETIONS: completion_create_params.CompletionCreateParamsNonStreaming,
        Route.MESSAGES: message_create_params.MessageCreateParamsNonStreaming,
    }
    for route, params in clients.items():
        body = openapi_document()["paths"][route.value]["post"]["requestBody"]["content"]["application/json"]["schema"]
        hints = get_type_hints(params, include_extras=True)
        assert set(body["required"]) == {name for name, hint in hints.items() if get_origin(hint) is Required}, route


@pytest.fixture
def engine_socket(socket_folder: Path) -> Iterator[Path]:
    """Run an engine double in a thread and yield its socket."""
    with running_in_thread(EngineDouble(name=NAME), socket_folder / "engine.sock"):
        yield socket_folder / "engine.sock"


@pytest.fixture
def api(memory_folder: Path, store: Store, engine_socket: Path) -> Iterator[Any]:
    """Yield the document of an application in front of the double, with served and other names as model names."""
    names, admission = ModelNames(NAME), Admission(max_running=8, max_tokens=8, max_queued=8, queue_timeout_s=1)
    names.loaded = {ONE}
    authenticator = Authenticator(store)

    @asynccontextmanager
    async def lease(model: str, *, without: Lease | None = None) -> AsyncIterator[Lease]:
        names.resolve(model)
        async with connections(engine_socket, silence_s=10) as engine:  # each request runs in a loop of its own
            yield Lease(engine, ONE, NAME, TokenPace())

    parts = gateway(
        OneBackend(names, admission, lease),
        Settings(
            home=memory_folder,
            serve=ServeSettings(allowed_hosts=("*",)),
            fine_tuning=FineTuningSettings(bases={"small": "org/small"}),
            files=FilesSettings(min_free_gb=0),
        ),
        store,
        GatewayMetrics(CollectorRegistry()),
        Authentication(authenticator, on_failure=lambda fault: None),
    )
    names.serve(ONE)
    admission.available()
    parts.request_log.start()
    api_schema = schemathesis.openapi.from_asgi("/openapi.json", parts.app)
    authenticator.refresh()  # from here on keys are required if there are any
    schema = {"enum": [*names.all(), "other"]}
    api_schema.raw_schema["paths"]["/v1/models/{name}"]["parameters"][0]["schema"] = schema
    for route in Route:
        body = api_schema.raw_schema["paths"][route.value]["post"]["requestBody"]["content"]["application/json"][
            "schema"
        ]
        body["properties"]["model"] = schema
    yield api_schema
    parts.request_log.close()


def cases() -> Iterator[tuple[str, str, GenerationMode]]:
    """Yield each operation with documented requests and, where possible, with undocumented ones."""
    for path, methods in openapi_document()["paths"].items():
        for method in methods.keys() - {"parameters"}:
            yield method, path, GenerationMode.POSITIVE
            if "requestBody" in methods[method]:
                yield method, path, GenerationMode.NEGATIVE


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path", "mode"), sorted(cases()))
def test_every_response_is_documented_in_openapi(api: Any, method: str, path: str, mode: GenerationMode) -> None:
    ask_all(api[path][method], mode, {"anyone": None}, EXAMPLES)


@pytest.fixture
def callers(store: Store) -> dict[str, dict[str, str]]:
    """Return the headers of callers with full, partial and no access to a server that requires keys."""
    keys = Keyring(store, ALICE)
    admin = keys.create(frozenset({Scope.ADMIN}), limits=Limits())
    limited = keys.create(frozenset({Scope.INFER, Scope.FEEDBACK}), limits=Limits(requests_per_minute=3))
    secrets = {"admin": admin.secret, "limited": limited.secret, "wrong": "none-of-yours"}
    return {caller: {"authorization": f"Bearer {secret}"} for caller, secret in secrets.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), sorted({(method, path) for method, path, _ in cases()}))
def test_every_response_of_a_server_that_requires_keys_is_documented_in_openapi(
    callers: dict[str, dict[str, str]], api: Any, method: str, path: str
) -> None:
    """A caller's access depends on the path and not on the body."""
    statuses = ask_all(api[path][method], GenerationMode.POSITIVE, callers, EXAMPLES_WITH_KEYS)
    admin, limited, wrong = (statuses[caller] for caller in ("admin", "limited", "wrong"))
    if path in OPEN:
        assert admin == limited == wrong == {200}
        return
    assert method == "delete" or not admin & {401, 403}
    assert wrong <= {401, 429}
    if path.startswith(("/svc/", "/metrics", "/v1/fine_tuning/", "/v1/batches", "/v1/files", "/v1/uploads")):
        assert limited == {403}
    else:
        assert method == "delete" or not limited & {401, 403}


def ask_all(
    operation: Any, mode: GenerationMode, callers: Mapping[str, dict[str, str] | None], examples: int
) -> dict[str, set[int]]:
    """Send the same requests for each caller.

    Args:
        callers: headers of each caller.
        examples: maximum number of requests per caller.

    Returns:
        The status codes of each caller's responses, each of which matched the document.
    """
    statuses = {caller: set[int]() for caller in callers}

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case[Any]) -> None:
        for caller, headers in callers.items():
            statuses[caller].add(case.call_and_validate(checks=CHECKS, headers=headers).status_code)

    ask()
    return statuses
