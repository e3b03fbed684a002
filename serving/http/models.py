"""The models that clients may name: listed, shown, and not deleted.

What serves and what is on disk is the operator's to change, by promotion and in the registry; a client may ask for both
answers without harm. A key that may ask some models only is told of no others.
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
    """A client asked to delete a model."""


def require_model(router: Router, principal: Principal | None, model: str) -> None:
    """Raises where a key may not ask a model, as where there is no such model: whether there is one it does not learn.

    Raises:
        ModelNotFoundError: says which it may ask.
    """
    if principal is None or principal.models is None:
        return
    if principal.may_ask(model) and router.served_name(model) is not None:
        return
    names = ", ".join(name for name in router.names() if principal.may_ask(name))
    raise ModelNotFoundError(
        f"model {model[:SHOWN_CHARS]!r} is not served here, or this key may not ask it",
        expected=f"one of {names}" if names else "a model that this key may ask; none of those is served",
    )


def add_models(app: FastAPI, router: Router) -> None:
    """Adds /v1/models to an application.

    Args:
        router: the names that resolve now.
    """

    def model(name: str, backend: Backend) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": backend.names.since, "owned_by": OWNER}

    async def found(request: Request, name: str) -> Backend:
        require_model(router, request_state(request.scope).principal, name)
        to = router.find(name)
        await to.backend.check(to.model)
        return to.backend

    @app.get("/v1/models")
    async def list_models(request: Request) -> JSONResponse:
        principal = request_state(request.scope).principal
        asked = [each for each in router.backends if principal is None or principal.may_ask(each.names.name)]
        listed = [model(name, backend) for backend in asked for name in backend.names.all()]
        return JSONResponse({"object": "list", "data": listed})

    # A slash in a name arrives as %2F, which is decoded before the path is matched.
    @app.get("/v1/models/{name:path}")
    async def show_model(request: Request, name: str) -> JSONResponse:
        return JSONResponse(model(name, await found(request, name)))

    @app.delete("/v1/models/{name:path}", response_model=None)
    async def delete_model(request: Request, name: str) -> NoReturn:
        await found(request, name)
        raise ModelNotDeletableError(
            f"model {name!r} is served, and models are not deleted over HTTP",
            todo="ask the operator to promote another version, and to delete this one on disk",
        )
