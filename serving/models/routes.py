"""Endpoints that list and describe the models that clients may use, and delete fine-tuned models.

Only the operator can change which versions are served and stored. Deleting a fine-tuned model therefore only hides it
from serving.protocols.error_code import ErrorCode, answered_with
from clients. A key that is restricted to some models cannot see any other models.
"""

from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse

from serving.engines.model_names import SHOWN_CHARS, ModelNotFoundError
from serving.http.actor import actor_of
from serving.http.request_state import request_state
from serving.models.fine_tuned_models import PREFIXES, FineTunedModels
from serving.models.fine_tuned_rows import FineTunedModel
from serving.models.router import Backend, Router
from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import SvcError
from svc.identity.principal import Principal

OWNER = "tuneserve"


@answered_with(403, ErrorCode.MODEL_NOT_DELETABLE)
class ModelNotDeletableError(SvcError):
    """Raised when a client tries to delete a model that is not fine-tuned, or that it does not own."""


def require_model(router: Router, principal: Principal | None, model: str) -> None:
    """Check that a key may use a model.

    Raises:
        ModelNotFoundError: the key may not use the model, or the model does not exist. The error does not
            reveal which of these is the case, and lists the models that the key may use.
    """
    if principal is None:
        return
    backend = router.backend(model.partition("@")[0])
    if principal.models is None and (backend is None or not backend.names.owners):
        return
    if backend is not None and principal.may_ask(model, backend.names.owners):
        return
    if principal.models is None:
        raise router.unknown(model)
    names = ", ".join(name for name in router.names() if principal.may_ask(name))
    raise ModelNotFoundError(
        f"model {model[:SHOWN_CHARS]!r} is not served here, or this key may not use it",
        expected=f"one of {names}" if names else "a model that this key may use (none of them is currently served)",
    )


def _may_use(principal: Principal | None, backend: Backend) -> bool:
    return principal is None or principal.may_ask(backend.names.name, backend.names.owners)


def add_models(app: FastAPI, router: Router, fine_tuned: FineTunedModels) -> None:
    """Add the /v1/models routes to an application."""

    def model(name: str, backend: Backend) -> dict[str, Any]:
        return _object(name, backend.names.since, OWNER)

    def trained(name: str, found: FineTunedModel) -> dict[str, Any]:
        return _object(name, int(found.created_at.timestamp()), fine_tuned.organization)

    async def find_fine_tuned(request: Request, name: str) -> FineTunedModel | None:
        if not name.startswith(PREFIXES):
            return None
        return await fine_tuned.find_model(name, request_state(request.scope).principal)

    async def find_backend(request: Request, name: str) -> Backend:
        require_model(router, request_state(request.scope).principal, name)
        to = router.find(name)
        await to.backend.check(to.model)
        return to.backend

    @app.get("/v1/models")
    async def list_models(request: Request) -> JSONResponse:
        state = request_state(request.scope)
        backends = [each for each in router.backends if _may_use(state.principal, each)]
        models = [model(name, backend) for backend in backends for name in backend.names.all()]
        models += [trained(found.name, found) for found in await fine_tuned.read_all(state.visible_owner)]
        return JSONResponse({"object": "list", "data": models})

    # A slash in a name arrives as %2F, which is decoded before the path is matched.
    @app.get("/v1/models/{name:path}")
    async def show_model(request: Request, name: str) -> JSONResponse:
        if found := await find_fine_tuned(request, name):
            return JSONResponse(trained(name, found))
        return JSONResponse(model(name, await find_backend(request, name)))

    @app.delete("/v1/models/{name:path}")
    async def delete_model(request: Request, name: str) -> JSONResponse:
        found = await find_fine_tuned(request, name)
        if found is None:
            await find_backend(request, name)
            raise ModelNotDeletableError(
                f"model {name!r} cannot be deleted: the API deletes only fine-tuned models",
                todo="ask the operator to promote another version and to delete this version on the server",
            )
        if request_state(request.scope).visible_owner not in (None, found.owner):
            raise ModelNotDeletableError(f"model {name!r} can be deleted only with the key that trained it")
        await fine_tuned.delete(found, actor_of(request))
        return JSONResponse({"id": name, "object": "model", "deleted": True})


def _object(name: str, created: int, owner: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": owner}
