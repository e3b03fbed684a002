"""Finds the fine-tuned models named in requests, and the engines that serve them.

A model is usable as soon as its job has succeeded, without being promoted. It is served by any engine that applies
adapters to the same base. If there is no such engine, one is started for the model. Only the owner of the job may use
the model; all other clients get the error for an unknown name.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.admission.errors import EngineUnavailableError, QueueOverflowError
from serving.models.fine_tuned_name import PREFIX
from serving.models.fine_tuned_rows import FineTunedModel, delete_model, find_model, read_models
from serving.models.router import Backend, Destination, Router
from svc.errors import SvcError
from svc.identity.actor import Actor
from svc.identity.principal import Principal, Scope
from svc.store.audit import Action, AuditEntry
from svc.store.outage_log import log_store_error
from svc.version import Target, VersionId

log = logging.getLogger(__name__)

PREFIXES: Final = (PREFIX, "ft-")
"""Prefixes of fine-tuned models' names: the prefix that clients see, and the prefix in the registry
(serving.fine_tuning.recipe)."""
_NAME = re.compile(r"[A-Za-z0-9:._/@-]{1,512}")  # PostgreSQL rejects some other characters
_KNOWN_S = 5.0
"""Seconds for which a model read from the store is cached. After a model is deleted on one server, other servers may
keep serving it for up to this long."""
_UNKNOWN_S = 1.0
_MAX_KNOWN = 10_000


class ModelNotLoadedError(EngineUnavailableError):
    """Raised when no engine can serve a fine-tuned model."""


@dataclass(frozen=True, slots=True)
class _Known:
    model: FineTunedModel | None
    until: float


@dataclass(frozen=True, slots=True)
class Loader:
    """Starts engines for models that were not promoted.

    Attributes:
        targets: function that returns a target for each format that a version can be served in, preferred format first.
        load: see `serving.models.deployments.Deployments.load`.
        patience_s: maximum time that a request waits, in seconds.
        max_waiting: maximum number of requests that wait for engines to start.
    """

    targets: Callable[[VersionId], Sequence[Target]]
    load: Callable[[VersionId, Sequence[Target]], Awaitable[None]]
    patience_s: float
    max_waiting: int


class FineTunedModels:
    """Finds fine-tuned models. All methods must be called on one event loop.

    Args:
        organization: name that the API reports as the owner of these models (`owned_by`).
        loader: starts an engine for a model that no running engine can serve; None to start no engines.
        clock: function that returns monotonic time, in seconds.

    Attributes:
        organization: see the argument.
    """

    def __init__(
        self,
        store: Store,
        router: Router,
        organization: str,
        *,
        loader: Loader | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loader = loader
        self._loading: dict[VersionId, asyncio.Task[None]] = {}
        self._waiting = 0
        self.organization = organization
        self._store = store
        self._router = router
        self._clock = clock
        self._known: dict[str, _Known] = {}

    async def find(self, model: str, principal: Principal | None) -> Destination | None:
        """Return the backend for a request, or None if no job has trained the model, in which case the router must find
        the backend.

        Args:
            model: model name as sent by the client, which begins with one of `PREFIXES`.

        Raises:
            ModelNotFoundError: there is no such model, or the key is not allowed to use it.
            ModelNotLoadedError: no engine can serve the model now.
        """
        found = await self.find_model(model, principal)
        return None if found is None else await self._place(found)

    async def find_model(self, model: str, principal: Principal | None) -> FineTunedModel | None:
        """Return a fine-tuned model, or None if the name may belong to a model that was not trained by a job.

        Raises:
            ModelNotFoundError: the name can only belong to a fine-tuned model, and there is none; or the key is
                not allowed to use the model.
        """
        found = await self._read(model)
        if found is None:
            operator = principal is None or principal.may(Scope.ADMIN)
            if model.startswith(PREFIX) or (self._was_of_a_job(model) and not operator):
                raise self._router.unknown(model)
            return None
        if principal is not None and not principal.may_ask(found.version.name, (found.owner,)):
            raise self._router.unknown(model)
        return found

    async def read_all(self, owner: str | None) -> list[FineTunedModel]:
        """Return an owner's fine-tuned models, newest first. Empty while the store is not responding.

        Args:
            owner: id of the owner, or None for the models of all owners.
        """
        try:
            return await asyncio.to_thread(read_models, self._store, owner)
        except SQLAlchemyError:
            log_store_error(log, "the fine-tuned models cannot be read; only served ones are listed")
            return []

    async def delete(self, model: FineTunedModel, actor: Actor) -> None:
        """Delete a fine-tuned model. Its version stays in the registry."""
        entry = AuditEntry(Action.DELETE_MODEL, model.name, actor, details={"version": str(model.version)})
        await asyncio.to_thread(delete_model, self._store, model, entry)
        for name in (model.name, str(model.version)):
            self._known.pop(name, None)

    def _was_of_a_job(self, model: str) -> bool:
        """Return whether an unknown name has the form `NAME@N`, where NAME is a served model that was trained by jobs.
        It may be a fine-tuned model that its owner has deleted, although its version is still in the registry.
        """
        name, at, number = model.partition("@")
        backend = self._router.backend(name)
        return bool(at and number.isdecimal() and backend and backend.names.owners)

    async def _read(self, model: str) -> FineTunedModel | None:
        known, now = self._known.get(model), self._clock()
        if known is not None and now < known.until:
            return known.model
        if not _NAME.fullmatch(model):
            return None
        try:
            found = await asyncio.to_thread(find_model, self._store, model)
        except SQLAlchemyError:
            if known is None or known.model is None:
                raise
            return known.model
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[model] = _Known(found, now + (_KNOWN_S if found else _UNKNOWN_S))
        return found

    async def _place(self, model: FineTunedModel) -> Destination:
        backend = await self._backend(model.version)
        if backend is None and self._loader is not None:
            await self._loaded(self._loader, model)
            backend = await self._backend(model.version)
        if backend is None:
            raise _not_loaded(model, "is not loaded")
        return Destination(backend, str(model.version), version=model.version)

    async def _loaded(self, loader: Loader, model: FineTunedModel) -> None:
        """Wait until an engine has been started for a model. All requests for the model wait for the same engine
        startup, which continues even after the last of them is cancelled.
        """
        task = self._loading.get(model.version)
        if task is None:
            task = self._loading[model.version] = asyncio.create_task(self._load(loader, model))
            task.add_done_callback(lambda ended: self._ended(model.version, ended))
        if self._waiting >= loader.max_waiting:
            raise QueueOverflowError(
                f"{self._waiting} requests are waiting for models to be loaded", todo="retry later"
            )
        self._waiting += 1
        try:
            async with asyncio.timeout(loader.patience_s):
                await asyncio.shield(task)
        except TimeoutError:
            raise _not_loaded(model, f"is still being loaded after {loader.patience_s:g} s") from None
        finally:
            self._waiting -= 1

    def _ended(self, version: VersionId, task: asyncio.Task[None]) -> None:
        del self._loading[version]
        if not task.cancelled():
            task.exception()  # all clients may have disconnected; asyncio would warn about the unread error

    async def _load(self, loader: Loader, model: FineTunedModel) -> None:
        targets = await asyncio.to_thread(loader.targets, model.version)
        if not targets:
            raise self._router.unknown(model.name)
        try:
            await loader.load(model.version, targets)
        except SvcError as error:  # logged by the loader; its text may contain paths
            raise _not_loaded(model, "could not be loaded") from error

    async def _backend(self, version: VersionId) -> Backend | None:
        """Return a backend whose engines serve a version or apply it as an adapter, or None if there is none."""
        own, unavailable = self._router.backend(version.name), None
        if own is not None and await own.takes(version):
            return own
        for backend in sorted(self._router.backends, key=lambda each: version not in each.names.guests):
            if backend is not own and await backend.takes(version):
                if backend.admission.unavailable_reason is None:
                    return backend
                unavailable = unavailable or backend
        return unavailable


def _not_loaded(model: FineTunedModel, wrong: str) -> ModelNotLoadedError:
    return ModelNotLoadedError(
        f"model {model.name!r} {wrong}",
        expected="an engine that serves adapters for the same base, or enough memory for another engine",
        todo=f"retry later, or ask the operator to load it: svc add {model.version}",
    )
