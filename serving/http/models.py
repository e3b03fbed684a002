"""Endpoints that list and describe the models that clients may use. Requests to delete a model are refused.

Only the operator changes which versions are served and stored, by promotion and in the registry. A key
that is restricted to some models sees no other models.
"""

from typing import Any, NoReturn

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse

from serving.http.request_state import request_state
from serving.model_names import SHOWN_CHARS, ModelNotFoundError
from serving.router import Backend, Router
from svc.errors import SvcError
from svc.identity.principal import Principal

OWNER = "tuneserve"


class ModelNotDeletableError(SvcError):
    """Raised when a client tries to delete a model."""


def require_model(router: Router, principal: Principal | None, model: str) -> None:
    """Check that a key may use a model.

    Raises:
        ModelNotFoundError: the key may not use the model, or the model does not exist. The error does not
            reveal which of these is the case, and lists the models that the key may use.
    """
    if principal is None or principal.models is None:
        return
    if principal.may_ask(model) and router.served_name(model) is not None:
        return
    names = ", ".join(name for name in router.names() if principal.may_ask(name))
    raise ModelNotFoundError(
        f"the model {model[:SHOWN_CHARS]!r} is not served here, or this key may not use it",
        expected=f"one of {names}" if names else "a model that this key may use (none of them is currently served)",
    )


def add_models(app: FastAPI, router: Router) -> None:
    """Add the /v1/models routes to an application."""

    def model(name: str, backend: Backend) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": backend.names.since, "owned_by": OWNER}

    async def find_backend(request: Request, name: str) -> Backend:
        require_model(router, request_state(request.scope).principal, name)
        to = router.find(name)
        await to.backend.check(to.model)
        return to.backend

    @app.get("/v1/models")
    async def list_models(request: Request) -> JSONResponse:
        principal = request_state(request.scope).principal
        backends = [each for each in router.backends if principal is None or principal.may_ask(each.names.name)]
        models = [model(name, backend) for backend in backends for name in backend.names.all()]
        return JSONResponse({"object": "list", "data": models})

    # A slash in a name arrives as %2F, which is decoded before the path is matched.
    @app.get("/v1/models/{name:path}")
    async def show_model(request: Request, name: str) -> JSONResponse:
        return JSONResponse(model(name, await find_backend(request, name)))

    @app.delete("/v1/models/{name:path}", response_model=None)
    async def delete_model(request: Request, name: str) -> NoReturn:
        await find_backend(request, name)
        raise ModelNotDeletableError(
            f"the model {name!r} cannot be deleted: the API does not delete models",
            todo="ask the operator to promote another version and to delete this version on the server",
        )
