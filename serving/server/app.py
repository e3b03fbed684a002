"""The HTTP application and its complete list of routes.

The application has no documentation pages, no CORS and no redirects. Simple routes use FastAPI. Completions and token
counts are pure ASGI applications (see serving.gateway.inference). They are looked up by path and bypass the framework,
whose overhead is several times their own cost. Both kinds of routes pass through the same middleware.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as Path
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.admission.errors import EngineUnavailableError
from serving.batches.routes import Batches
from serving.feedback.routes import FeedbackIntake
from serving.files.routes import Files
from serving.files.upload_routes import Uploads
from serving.fine_tuning.routes import FineTuning
from serving.gateway.authentication import Authentication
from serving.gateway.host import AllowedHosts
from serving.gateway.inference import Gateway, completion_endpoints
from serving.gateway.middleware import RequestMiddleware
from serving.gateway.token_counts import token_count_endpoints
from serving.http.errors import install_handlers
from serving.http.request_state import request_state
from serving.models.routes import add_models
from serving.server.administration import Administration
from serving.server.openapi import openapi_document
from serving.telemetry.engine_metrics import EngineMetrics
from svc.identity.principal import Scope as KeyScope

_OPENMETRICS = "application/openmetrics-text"
_FOR_ADMINS = "shown only to keys with the scope 'admin'"


def build_app(
    gateway: Gateway,
    *,
    feedback: FeedbackIntake,
    engine_metrics: EngineMetrics,
    status: Callable[[], Mapping[str, Any]],
    authentication: Authentication,
    administration: Administration,
    fine_tuning: FineTuning,
    batches: Batches,
    files: Files,
    uploads: Uploads,
    draining: asyncio.Event,
) -> "Application":
    """Return the HTTP application for a gateway.

    Args:
        gateway: answers completions; the other routes use its router and metrics.
        feedback: answers /v1/feedback.
        engine_metrics: metrics that are refreshed for each request to /metrics, in the same registry as
            `gateway.metrics`.
        status: function that returns the JSON values of /svc/status; it is called in a thread.
        authentication: admits requests.
        administration: answers administration requests.
        fine_tuning: answers /v1/fine_tuning.
        batches: answers /v1/batches.
        files: answers /v1/files.
        uploads: answers /v1/uploads.
        draining: event that is set when load balancers must stop sending requests.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    endpoints = completion_endpoints(gateway) | token_count_endpoints(gateway)
    for path, endpoint in endpoints.items():  # for other methods, which are rejected
        app.router.routes.append(Path(path, endpoint, methods=["POST"]))
    app.router.routes.append(Path("/v1/feedback", feedback.answer, methods=["POST"]))
    add_models(app, gateway.router, gateway.fine_tuned)
    _add_health(app, gateway, draining, needs_model=not fine_tuning.enabled)
    _add_operations(app, gateway, engine_metrics, status)
    administration.add_to(app)
    fine_tuning.add_to(app)
    batches.add_to(app)
    files.add_to(app)
    uploads.add_to(app)
    install_handlers(app)
    hosts = AllowedHosts((gateway.settings.host, *gateway.settings.allowed_hosts))
    layer = partial(
        RequestMiddleware, router=gateway.router, hosts=hosts, limiter=gateway.limiter, authentication=authentication
    )
    app.add_middleware(layer)
    return Application(app, {path: layer(endpoint) for path, endpoint in endpoints.items()})


@dataclass(frozen=True, slots=True)
class Application:
    """Dispatches each request by path, either directly to an endpoint or, by default, to the framework."""

    framework: FastAPI
    direct: Mapping[str, ASGIApp]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self.direct.get(scope["path"]) if scope.get("method") == "POST" else None
        await (endpoint or self.framework)(scope, receive, send)


def _add_health(app: FastAPI, gateway: Gateway, draining: asyncio.Event, *, needs_model: bool) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        if draining.is_set():
            return JSONResponse({"status": "draining"}, 503)
        reasons = [backend.admission.unavailable_reason for backend in gateway.router.backends]
        if None in reasons or not (reasons or needs_model):  # one available model keeps the server in service
            return JSONResponse({"status": "ready"})
        reason = next(iter(reasons), "no model is served")
        headers = {"retry-after": str(EngineUnavailableError.retry_after_s)}
        return JSONResponse({"status": "unavailable", "reason": reason}, 503, headers)

    @app.get("/health/live")
    async def live() -> JSONResponse:
        return JSONResponse({"status": "live"})  # any answer means live: a start may take half an hour


def _add_operations(
    app: FastAPI, gateway: Gateway, engine_metrics: EngineMetrics, status: Callable[[], Mapping[str, Any]]
) -> None:
    document = openapi_document()

    @app.get("/openapi.json")
    async def openapi() -> JSONResponse:
        return JSONResponse(document)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        # The encoder for OpenMetrics writes `vllm:` as `vllm_` unless the client accepts UTF-8 names.
        accept = request.headers.get("accept", "").replace(_OPENMETRICS, f"{_OPENMETRICS};escaping=allow-utf-8")
        encode, content_type = choose_encoder(accept)
        await engine_metrics.refresh()
        gateway.metrics.remove_idle(gateway.router.versions)
        page = await asyncio.to_thread(encode, gateway.metrics.registry)
        return Response(page, headers={"content-type": content_type})

    @app.get("/svc/status")
    async def show_status(request: Request) -> JSONResponse:
        principal = request_state(request.scope).principal
        # In a thread, because it reads the store, and streams must not wait for that.
        shown = await asyncio.to_thread(status)
        if principal is not None and not principal.may(KeyScope.ADMIN):
            shown = _without_inside(shown)
        return JSONResponse(dict(shown))


def _without_inside(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the server's status that keys with the scope `metrics` may see.

    The process, the other servers, the engines' plans and the error texts are excluded, because they contain paths
    on the machine and names of machines.

    Args:
        status: the complete status from `serving.models.deployments.Deployments.status`.
    """
    models = [_of_model(model) for model in status.get("models", ())]
    refused = dict.fromkeys(status.get("refused", ()), _FOR_ADMINS)
    return {**status, "models": models, "refused": refused, "pid": None, "servers": []}


def _of_model(model: Mapping[str, Any]) -> dict[str, Any]:
    engine, swap = model["engine"], model["last_swap"]
    return {
        **model,
        "engine": {**engine, "plan": None, "last_error": engine["last_error"] and _FOR_ADMINS},
        "last_swap": swap and {**swap, "reason": swap["reason"] and _FOR_ADMINS},
    }
