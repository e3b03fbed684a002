"""Manages the models that a server serves, including those added or removed while it runs.

Models start one after another, because engines on one device would compete for memory and cores.
Before any model starts, the engines of an earlier server are adopted and the memory for the remaining
models is checked. A model that cannot be served does not affect the other models.
"""

import asyncio
import gc
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.engines.slots import EngineSlots
from serving.models.deployment import Deployment
from serving.models.fine_tuned_rows import owners_of
from serving.models.router import Router
from serving.models.server_views import ServerView, server_views
from serving.rollout.leadership import Leadership
from serving.rollout.served import is_served_elsewhere
from serving.store_changes.changes import Changes
from svc.engine.state import EngineState
from svc.errors import BusyError, EngineError, NotFoundError, SvcError
from svc.store.deployments import deployed_names, remove_deployment
from svc.store.desired import Desired, read_desired
from svc.store.outage_log import log_store_error
from svc.version import Target, VersionId

log = logging.getLogger(__name__)

_POLL_S = 1.0
_REGISTERED_S = 5.0
_DRAIN_S = 30.0
_RETRY_S = 60.0  # between attempts to start a model that another server serves
_IMPORTED_S = 60.0  # whether MLflow responds or not

_NOT_PROMOTED = 0  # generation of a desired state that is not in the store, where the first has 1

MakeRoom = Callable[[Target], Awaitable[None]]
OnReady = Callable[[Target], None]
OnFailure = Callable[[Target, SvcError], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Load:
    """A request to serve a version. `done` receives the result."""

    version: VersionId
    targets: Sequence[Target]
    done: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(eq=False, kw_only=True)
class Deployments:
    """A server's deployments, kept in sync with the set of models in the store.

    Attributes:
        build: function that builds a deployment. Its arguments are the deployment's first desired state, and a function
            that frees memory for the deployment's engines.
        changes: notifications about changes in the store, which this object waits for.
        leadership: object that holds this server's leases and id.
        registered: function that returns the names of all models, for errors about models that are not
            served. It reads from disk.
        on_ready: called with each version as soon as it is being served.
        on_failure: called with the error if a model cannot be served, unless `run` raises that error.
        server: id of this server; empty if no other server can use the store.
        loaded_idle_s: time without requests after which a model that `load` started is stopped, in seconds.
        looked: event that is set once the engines of an earlier server, if any, have been adopted.
    """

    build: Callable[[Desired, MakeRoom], Deployment]
    router: Router
    slots: EngineSlots
    store: Store
    changes: Changes
    leadership: Leadership
    registered: Callable[[], Sequence[str]]
    on_ready: OnReady
    on_failure: OnFailure
    server: str = ""
    loaded_idle_s: float = 600.0

    def __post_init__(self) -> None:
        self._all: dict[str, Deployment] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, str] = {}
        self._retry_at: dict[str, float] = {}
        self._failed = False  # whether something could not be done and is tried again soon
        self._on_demand: dict[str, float | None] = {}  # each with the idle time that it has if the operator adds it
        self._bringing = asyncio.Lock()
        self._requested: asyncio.Queue[_Load] = asyncio.Queue()
        self.looked = asyncio.Event()

    @property
    def all(self) -> list[Deployment]:
        """All deployments, whether or not they are currently serving."""
        return list(self._all.values())

    def served(self) -> Mapping[str, Target]:
        """Return the version and format that each model currently serves, keyed by model name.

        The served version may not be the desired version yet.
        """
        return {deployment.name: deployment.reconciler.actual.target for deployment in self.all}

    def status(self) -> Mapping[str, Any]:
        """Return the JSON values of /svc/status.

        This reads the store, so it must not run on the event loop's thread.
        """
        models = [deployment.status() for deployment in self.all]
        try:
            servers = server_views(self.store)
        except SQLAlchemyError:
            log_store_error(log, "could not read the list of servers that use the store")
            servers = []
        return {
            "models": models,
            "refused": dict(self._refused),
            "pid": os.getpid(),
            "server": self.leadership.server,
            "servers": [_server_row(server) for server in servers],
        }

    async def run(self, wanted: Sequence[Desired]) -> None:
        """Start the given models, then follow changes to the store's set of models until cancelled.

        Raises:
            SvcError: none of the models can be served, or there is not enough memory for all of them.
        """
        try:
            await self._start_first(wanted)
            works = [
                asyncio.create_task(work)
                for work in (
                    self._follow(),
                    self._load_requested(),
                    self._leave_out_of_collections(),
                    self.slots.end_postponed(),
                )
            ]
            try:
                while True:
                    watched = {*works, *self._tasks.values()}
                    done, _ = await asyncio.wait(watched, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        if task in works or task in self._tasks.values():  # skips tasks of removed models
                            task.result()
                    works = [task for task in works if not task.done()]
            finally:
                for task in works:
                    task.cancel()
                await asyncio.gather(*works, return_exceptions=True)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def load(self, version: VersionId, targets: Sequence[Target]) -> None:
        """Start serving an unpromoted version, and return once it is served. The version is served until it
        becomes idle.

        The version's model is not added to the store's set of models. Each server loads only the models that its own
        clients request, and loads none of them after a restart.

        Args:
            targets: the version in every format in which it can be served, preferred format first.

        Raises:
            SvcError: there is not enough memory, the engine did not start, or another version of the model is in use.
        """
        load = _Load(version, targets)
        self._requested.put_nowait(load)
        await load.done

    async def stop(self, *, leave: bool = False) -> None:
        """Stop all engines, including an earlier server's engines that were not adopted. Call this after `run` ends.

        Args:
            leave: do not stop engines that are ready. A server that starts later adopts them.
        """
        try:
            await asyncio.gather(*(each.stop(leave=leave and each.name not in self._on_demand) for each in self.all))
        finally:
            if not leave:
                await self.slots.end_orphans()

    async def _start_first(self, wanted: Sequence[Desired]) -> None:
        try:
            for desired in wanted:
                await self._add(desired)
            missing = [deployment for deployment in self.all if not await deployment.reconciler.adopt()]
        finally:
            self.looked.set()
        await self.slots.end_orphans()
        needed = {each.reconciler.actual.target: each.pool.size for each in missing}
        await self.slots.require_memory(needed)
        failed = 0
        for deployment in sorted(self.all, key=missing.__contains__):  # models that already answer come first
            if error := await self._start(deployment):
                failed += 1
                if failed == len(self._all):
                    raise error  # shown by the caller
                self.on_failure(deployment.reconciler.actual.target, error)

    async def _leave_out_of_collections(self) -> None:
        """Exclude imported objects from garbage collection once the last import has finished, or after `_IMPORTED_S`.

        Scanning these objects repeatedly would delay every stream by 100 ms.
        """
        await asyncio.gather(*(each.alias.settled(_IMPORTED_S) for each in self.all))  # MLflow is imported last
        gc.freeze()

    async def _add(self, desired: Desired) -> Deployment:
        owners = await asyncio.to_thread(owners_of, self.store, desired.name)
        self._all[desired.name] = deployment = self.build(desired, self._make_room)
        deployment.names.owners = owners  # before the first request
        deployment.rollouts.split = partial(self.router.split, desired.name)
        self.router.serve(desired.name, deployment)
        return deployment

    async def _start(self, deployment: Deployment) -> SvcError | None:
        """Start a deployment and keep it running.

        If it fails to start, return the error, which the caller must show, and keep retrying in the background.
        """
        target, failed = deployment.reconciler.actual.target, None
        try:
            await deployment.reconciler.start()
        except SvcError as error:
            failed = error
        except Exception as error:  # any error of one model must not affect the others
            log.exception("could not serve %s", target)
            failed = EngineError(f"could not start {target}: {error!r}")
        self._tasks[deployment.name] = asyncio.create_task(deployment.run())
        if not failed:
            self.on_ready(deployment.reconciler.actual.target)
        return failed

    async def _follow(self) -> None:
        next_read = 0.0
        while True:
            count, self._failed = self.changes.count, False
            try:
                names = await asyncio.to_thread(deployed_names, self.store)
                if time.monotonic() >= next_read:  # less often: it reads a folder for each model
                    self.router.registered = await asyncio.to_thread(self.registered)
                    next_read = time.monotonic() + _REGISTERED_S
            except (SQLAlchemyError, OSError):
                self._failed = True
                log_store_error(log, "could not read which models to serve; continuing to serve the current models")
            else:
                for name in [name for name in self._on_demand if self._is_idle(name)]:
                    await self._try(name, self._unload)
                for name in [name for name in self._on_demand if name in names and name in self._tasks]:
                    self._all[name].idling.timeout_s = self._on_demand.pop(name)  # the operator has added it
                # A model without a task could not be stopped earlier; it may have been added again since.
                known = {*names, *self._on_demand}
                for name in [name for name in self._all if name not in known or self._is_stuck(name)]:
                    await self._try(name, self._take_away)
                for name in [name for name in self._retry_at if name not in names]:
                    del self._retry_at[name], self._refused[name]
                for name in [name for name in names if name not in self._all]:
                    if time.monotonic() >= self._retry_at.get(name, 0.0):
                        await self._try(name, self._bring)
            again = self._failed or self._retry_at
            await self.changes.wait(count, _POLL_S, within_s=_POLL_S if again else math.inf)

    def _is_stuck(self, name: str) -> bool:
        return name not in self._tasks and name not in self._on_demand  # those are started independently of this task

    def _is_idle(self, name: str) -> bool:
        """Return whether a model that `load` started has become idle, in which case its engines are stopped."""
        deployment = self._all[name]
        return deployment.pool.state is EngineState.IDLE and not deployment.admission.queued

    async def _unload(self, name: str) -> None:
        async with self._bringing:
            if name in self._on_demand and self._is_idle(name):
                await self._take_away(name)

    async def _load_requested(self) -> None:
        """Load models for requests, one after another, until cancelled."""
        while True:
            load = await self._requested.get()
            try:
                async with self._bringing:
                    await self._load(load.version, load.targets)
            except SvcError as error:
                log.warning("could not load %s for a request: %s", load.version, error)
                load.done.set_exception(error)
            except Exception as error:
                log.exception("could not load %s for a request", load.version)
                load.done.set_exception(EngineError(repr(error)))
            else:
                load.done.set_result(None)
            finally:
                load.done.cancel()  # if this was cancelled

    async def _load(self, version: VersionId, targets: Sequence[Target]) -> None:
        for each in self.all:
            if await each.takes(version):  # an engine that was started meanwhile
                return
        name = version.name
        if (other := self._all.get(name)) is not None:
            if name not in self._on_demand or not other.admission.idle_s:
                raise BusyError(f"another version of {name} is being served", todo=f"svc promote {version}")
            await self._take_away(name)
        desired = Desired(await self._fitting(targets), None, _NOT_PROMOTED)
        deployment = await self._add(desired)
        self._on_demand[name] = deployment.idling.timeout_s
        deployment.idling.timeout_s = deployment.idling.timeout_s or self.loaded_idle_s
        if failed := await self._start(deployment):
            await self._take_away(name)
            raise failed

    async def _fitting(self, targets: Sequence[Target]) -> Target:
        """Return the first target for which there is enough memory, freeing the memory of idle models if necessary.

        Raises:
            EngineError: there is not enough memory for any target.
        """
        for target in targets:
            with suppress(EngineError):
                await self._require_memory(target)
                return target
        for target in targets[:-1]:
            with suppress(EngineError):
                await self._make_room(target)
                return target
        await self._make_room(targets[-1])
        return targets[-1]

    async def _try(self, name: str, change: Callable[[str], Awaitable[None]]) -> None:
        """Add or remove a model. If this fails, log the error and try again later; other models are not affected."""
        try:
            await change(name)
        except Exception:
            self._failed = True
            log.exception("could not add or remove %s; retrying", name)

    async def _bring(self, name: str) -> None:
        """Start a newly added model.

        If the model cannot start, remove it from the store's set of models and show the reason in the status. If
        another server already serves the model, keep it in the set instead and try again later.
        """
        self._refused.pop(name, None)
        self._retry_at.pop(name, None)
        try:
            async with self._bringing:
                desired = await asyncio.to_thread(read_desired, self.store, name)
                if desired is None:
                    raise NotFoundError(f"no desired version is recorded for {name}", todo=f"svc add {name}@N")
                await self._make_room(desired.target)
                if failed := await self._start(await self._add(desired)):
                    self.on_failure(desired.target, failed)
        except SvcError as error:
            failed = error
        if failed:
            await self._refuse(name, failed)

    async def _refuse(self, name: str, why: SvcError) -> None:
        if await asyncio.to_thread(is_served_elsewhere, self.store, name, self.server):
            if name in self._all:
                await self._take_away(name, removed=False)
            self._refused[name] = f"{why}; another server serves the model, and this server will retry"
            self._retry_at[name] = time.monotonic() + _RETRY_S
        else:
            self._refused[name] = str(why)
            await asyncio.to_thread(remove_deployment, self.store, name)

    async def _make_room(self, target: Target) -> None:
        """Put idle models to sleep or stop them, longest idle first, until there is enough memory for a version's
        engines.

        Sleeping models are stopped last, because stopping them frees little GPU memory and makes them slow to
        start again.

        Raises:
            SvcError: there is not enough memory, and no idle model is left.
        """
        while True:
            try:
                return await self._require_memory(target)
            except EngineError as error:
                idle = [(idle_s, each) for each in self.all if (idle_s := each.idling.idle_s) is not None]
                longest = max(idle, key=itemgetter(0), default=None)
                if longest is not None and await longest[1].idling.sleep():
                    log.info("stopped %s's engines to free memory for %s: %s", longest[1].name, target, error.wrong)
                elif not await self._end_asleep():
                    raise

    async def _require_memory(self, target: Target) -> None:
        """Check that there is enough memory to start or wake the engines of a model."""
        name = target.version.name
        engines = self._all[name].pool.size if name in self._all else self.slots.first_engines(name)
        await self.slots.require_memory({target: engines})

    async def _end_asleep(self) -> bool:
        """Stop the engines of the sleeping model that has been idle longest. Return False if no model is asleep."""
        for each in sorted(self.all, key=lambda each: each.admission.idle_s, reverse=True):
            if await each.idling.end_asleep():
                log.info("stopped the sleeping engines of %s", each.name)
                return True
        return False

    async def _take_away(self, name: str, *, removed: bool = True) -> None:
        """Stop a model after its last request has ended, or after `_DRAIN_S` at the latest.

        Args:
            removed: whether the model was removed from the store's set of models. If so, the model's rollout is
                abandoned; otherwise, another server continues the rollout.
        """
        deployment = self._all[name]
        self.router.remove(name)
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                await deployment.admission.ended()
        if task := self._tasks.pop(name, None):  # none if the model could not be stopped in an earlier turn
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await deployment.pool.stop()  # tried again in the next turn if an engine does not stop
        if removed:
            await deployment.rollouts.abandon("the model was removed from the server")
        await deployment.close()
        deployment.metrics.remove()
        del self._all[name]
        self._on_demand.pop(name, None)
        log.info("%s is no longer served", name)


def _server_row(server: ServerView) -> dict[str, Any]:
    times = {name: getattr(server, name).isoformat(timespec="seconds") for name in ("started_at", "seen_at")}
    return asdict(server) | times
