"""The models that clients may name: listed, shown, and not deleted.

What serves and what is on disk is the operator's to change, by promotion and in the registry; a client may ask for both
answers without harm.
"""

from typing import Any, NoReturn

from fastapi import FastAPI
from starlette.responses import JSONResponse

from serving.router import Backend, Router
from svc.errors import SvcError

OWNER = "tuneserve"


class ModelNotDeletableError(SvcError):
    """A client asked to delete a model."""


def add_models(app: FastAPI, router: Router) -> None:
    """Adds /v1/models to an application.

    Args:
        router: the names that resolve now.
    """

    def model(name: str, backend: Backend) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": backend.names.since, "owned_by": OWNER}

    async def found(name: str) -> Backend:
        to = router.find(name)
        await to.backend.check(to.model)
        return to.backend

    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        listed = [model(name, backend) for backend in router.backends for name in backend.names.all()]
        return JSONResponse({"object": "list", "data": listed})

    # A slash in a name arrives as %2F, which is decoded before the path is matched.
    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> JSONResponse:
        return JSONResponse(model(name, await found(name)))

    @app.delete("/v1/models/{name:path}", response_model=None)
    async def delete_model(name: str) -> NoReturn:
        await found(name)
        raise ModelNotDeletableError(
            f"model {name!r} is served, and models are not deleted over HTTP",
            todo="ask the operator to promote another version, and to delete this one on disk",
        )
