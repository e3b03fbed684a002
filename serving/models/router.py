"""Chooses the model and the backend for a request.

During a rollout, the requests for a name are split between the production version and the candidate. The
version that answers a request is chosen after admission.
"""

import random
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import NamedTuple, Protocol

from serving.admission.admission import Admission
from serving.admission.tenant import Tenant
from serving.engines.balancer import Lease
from serving.engines.model_names import SHOWN_CHARS, ModelNames, ModelNotFoundError
from serving.rollout.split import Assignment, Split
from svc.version import VersionId


class Backend(Protocol):
    """Interface of an object that answers the requests for one model."""

    @property
    def names(self) -> ModelNames:
        """The names under which clients may request the model."""

    @property
    def admission(self) -> Admission:
        """Admission control for the model's engines."""

    @property
    def context(self) -> int:
        """Maximum combined length of a prompt and its answer, in tokens. If a request does not limit the length of
        its answer, admission assumes an answer of this maximum length.
        """

    async def check(self, model: str) -> None:
        """Check that a model name can be served. The registry is read only if necessary.

        Raises:
            ModelNotFoundError: no version has this name.
            EngineUnavailableError: no version is loaded yet.
        """

    async def takes(self, version: VersionId) -> bool:
        """Return whether the engines can serve a version, either directly or as an adapter of their base model. The
        version may belong to another model.

        If they can, `lease` and `admitted` accept the version's name. The registry is read only if necessary.
        """

    def lease(self, model: str, *, who: str = "", without: Lease | None = None) -> AbstractAsyncContextManager[Lease]:
        """Lease an engine for the duration of the `with` block. See `serving.engines.balancer.Balancer.lease`."""

    def admitted(
        self, model: str, who: str, tokens: int, tenant: Tenant, waiting: Callable[[], AbstractContextManager[None]]
    ) -> AbstractAsyncContextManager[Lease]:
        """Lease an engine for the duration of the `with` block, once the request is admitted. See `AdmittedLease`."""


class Destination(NamedTuple):
    """The backend chosen for a request, and the parameters for leasing an engine from it.

    Attributes:
        model: the model name to be passed to the lease.
        assignment: the version to which the model's rollout assigned the request, or None if there is no rollout or
            the client requested a version.
        version: the version that answers, if the client requested a fine-tuned model, else None. Another model's engine
            may serve the fine-tuned model.
    """

    backend: Backend
    model: str
    assignment: Assignment | None = None
    version: VersionId | None = None


class Router:
    """Routes requests to the models that a server serves, by name.

    Args:
        draw: function that returns a random number below 1, used for requests whose client is unknown.

    Attributes:
        registered: names of registered models, used in errors about models that are not served.
    """

    def __init__(self, *, draw: Callable[[], float] = random.random) -> None:
        self._draw = draw
        self._backends: dict[str, Backend] = {}
        self._splits: dict[str, Split] = {}
        self.registered: Collection[str] = ()

    def serve(self, name: str, backend: Backend) -> None:
        """From now on, route a model's requests to a backend."""
        self._backends[name] = backend

    def split(self, name: str, split: Split | None) -> None:
        """Set how a rollout splits a model's requests. None ends the split."""
        if split is None:
            self._splits.pop(name, None)
        else:
            self._splits[name] = split

    def remove(self, name: str) -> None:
        """Stop routing requests for a model."""
        self._backends.pop(name, None)
        self._splits.pop(name, None)

    @property
    def served(self) -> list[str]:
        """Names of the models that are served, or will be once their engines have started."""
        return list(self._backends)

    @property
    def backends(self) -> list[Backend]:
        """The backends of all models."""
        return list(self._backends.values())

    @property
    def only_version(self) -> VersionId | None:
        """The version in production if only one model is served and every key may use that model; otherwise None."""
        if len(self._backends) != 1:
            return None
        names = self.backends[0].names
        return names.served.version if names.served and not names.owners else None

    @property
    def versions(self) -> set[VersionId]:
        """All versions, of any model, that are in production or loaded."""
        return {version for backend in self.backends for version in backend.names.versions}

    def names(self) -> tuple[str, ...]:
        """Return the model names that currently resolve to a version, except the names of fine-tuned models, which only
        their owners may see.
        """
        return tuple(name for backend in self.backends if not backend.names.owners for name in backend.names.all())

    def served_name(self, model: str) -> str | None:
        """Return the name of the model that a request is for, or None if that model is not served.

        The name is returned even if the model is currently unavailable.
        """
        name = model.partition("@")[0]
        return name if name in self._backends else None

    def backend(self, name: str) -> Backend | None:
        """Return the backend of a model, or None if the model is not served."""
        return self._backends.get(name)

    def find(self, model: str, who: str = "") -> Destination:
        """Return the backend for a request.

        Args:
            model: model name as sent by the client.
            who: text that identifies a client or conversation; empty if unknown.

        Raises:
            ModelNotFoundError: no backend serves this model name.
            EngineUnavailableError: no version is loaded yet.
        """
        name = model.partition("@")[0]
        backend = self._backends.get(name)
        if backend is None or model == backend.names.assigned:
            raise self.unknown(model)
        backend.names.resolve(model)
        split = self._splits.get(name) if model == name else None
        if split is None:
            return Destination(backend, model)
        assignment = split.assign(who, self._draw)
        return Destination(backend, backend.names.assigned if assignment.candidate else model, assignment)

    def unknown(self, model: str) -> ModelNotFoundError:
        """Return the error for a model name that no backend serves."""
        name = model.partition("@")[0]
        names = ", ".join(self.names())
        served = f"one of {names}" if names else "a served model; none is served yet"
        shown = f"model {model[:SHOWN_CHARS]!r}"
        if name in self.registered:
            todo = f"ask the operator to add it: svc add {name}"
            return ModelNotFoundError(f"{shown} is registered, but not served", expected=served, todo=todo)
        return ModelNotFoundError(f"{shown} is not served here", expected=served)
