"""The models that a server serves, and how one comes or goes while it runs.

All start in turn, because engines on one device would take each other's memory and cores. What an earlier server left
is looked for before anything starts; whether there is memory for the rest, too. A model that cannot be served does
not keep the others from it.
"""

import asyncio
import gc
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from typing import Any

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.deployment import Deployment
from serving.replicas.places import EnginePlaces
from serving.router import Router, Share
from svc.errors import EngineError, NotFoundError, SvcError
from svc.store.deployments import deployed_names, remove_deployment
from svc.store.desired import Desired, read_desired
from svc.version import Target

log = logging.getLogger(__name__)

_POLL_S = 1.0
_REGISTERED_S = 5.0
_DRAIN_S = 30.0
_IMPORTED_S = 60.0  # whether MLflow answers or not

MakeRoom = Callable[[Target], Awaitable[None]]
OnReady = Callable[[Target], None]
OnFailure = Callable[[Target, SvcError], None]


class Deployments:
    """A set of deployments, kept as the store says.

    Args:
        build: makes a deployment from what it shall serve first, and from what makes room for its engines.
        check_memory: of engines with these versions beside those that run.
        registered: the names of all models, for who asks for one that is not served; reads the disk.
        on_ready: hears what is served, whenever a model has come.
        on_failure: hears why one cannot be served.

    Attributes:
        looked: set once what an earlier server left is adopted, or is found not to be there.
    """

    def __init__(
        self,
        build: Callable[[Desired, MakeRoom], Deployment],
        *,
        router: Router,
        places: EnginePlaces,
        store: Store,
        check_memory: Callable[[Sequence[Target]], None],
        registered: Callable[[], Sequence[str]],
        on_ready: OnReady,
        on_failure: OnFailure,
    ) -> None:
        self._build = build
        self._router = router
        self._places = places
        self._store = store
        self._check_memory = check_memory
        self._registered = registered
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._all: dict[str, Deployment] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, str] = {}
        self.looked = asyncio.Event()

    @property
    def all(self) -> list[Deployment]:
        """Those that there are, whether they serve or not."""
        return list(self._all.values())

    def served(self) -> Mapping[str, Target]:
        """What is served under each name, until it has come to what is desired."""
        return {deployment.name: deployment.reconciler.actual.target for deployment in self.all}

    def status(self) -> Mapping[str, Any]:
        """What /svc/status shows, JSON values; reads the store, in a thread beside the event loop."""
        models = [deployment.status() for deployment in self.all]
        return {"models": models, "refused": dict(self._refused), "pid": os.getpid()}

    async def run(self, wanted: Sequence[Desired]) -> None:
        """Starts these, and then follows the store until it is cancelled.

        Raises:
            SvcError: none of them can be served, or there is no memory for all.
        """
        try:
            await self._start_first(wanted)
            works = [asyncio.create_task(work) for work in (self._follow(), self._leave_out_of_collections())]
            try:
                while True:
                    watched = {*works, *self._tasks.values()}
                    done, _ = await asyncio.wait(watched, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        if task in works or task in self._tasks.values():  # and not of one that was removed
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

    async def stop(self, *, leave: bool = False) -> None:
        """Ends all engines, once `run` has ended; also those of an earlier server that nobody took over.

        Args:
            leave: those that are ready go on without us, for a server that starts later.
        """
        try:
            await asyncio.gather(*(deployment.stop(leave=leave) for deployment in self.all))
        finally:
            if not leave:
                await self._places.end_orphans()

    async def _start_first(self, wanted: Sequence[Desired]) -> None:
        try:
            for desired in wanted:
                self._add(desired)
            missing = [deployment for deployment in self.all if not await deployment.reconciler.adopt()]
        finally:
            self.looked.set()
        await self._places.end_orphans()
        await asyncio.to_thread(self._check_memory, [deployment.reconciler.actual.target for deployment in missing])
        failed: list[SvcError] = []
        for deployment in sorted(self.all, key=missing.__contains__):  # those that answer already come first
            error = await self._start(deployment)
            failed += [error] if error else []
        if len(failed) == len(self._all):
            raise failed[0]

    async def _leave_out_of_collections(self) -> None:
        """What was imported stays. To look through it again and again holds up every stream for 100 ms."""
        await asyncio.gather(*(each.alias.settled(_IMPORTED_S) for each in self.all))  # MLflow is imported last
        gc.freeze()

    def _add(self, desired: Desired) -> Deployment:
        self._all[desired.name] = deployment = self._build(desired, self._make_room)
        self._router.serve(desired.name, [Share(deployment)])
        return deployment

    async def _start(self, deployment: Deployment) -> SvcError | None:
        """Starts one, and keeps it; one that does not start is tried again and again. Why it did not."""
        target, failed = deployment.reconciler.actual.target, None
        try:
            await deployment.reconciler.start()
        except Exception as error:  # whatever keeps one model from being served keeps no other from it
            log.exception("%s is not served", target)
            failed = error if isinstance(error, SvcError) else EngineError(f"{target} does not start: {error!r}")
        self._tasks[deployment.name] = asyncio.create_task(deployment.run())
        if failed:
            self._on_failure(target, failed)
        else:
            self._on_ready(deployment.reconciler.actual.target)
        return failed

    async def _follow(self) -> None:
        look_at = 0.0
        while True:
            try:
                names = await asyncio.to_thread(deployed_names, self._store)
                if time.monotonic() >= look_at:  # less often: it reads a folder for each model
                    self._router.set_registered(await asyncio.to_thread(self._registered))
                    look_at = time.monotonic() + _REGISTERED_S
            except (SQLAlchemyError, OSError):
                log.exception("which models shall be served cannot be read; those that are served go on")
            else:
                # A model without a task could not be ended in an earlier turn; it may be wanted again since.
                for name in [name for name in self._all if name not in names or name not in self._tasks]:
                    await self._try(name, self._take_away)
                for name in [name for name in names if name not in self._all]:
                    await self._try(name, self._bring)
            await asyncio.sleep(_POLL_S)

    async def _try(self, name: str, change: Callable[[str], Awaitable[None]]) -> None:
        """Bring a model or take it away; the next turn tries again. A defect of one model concerns no other."""
        try:
            await change(name)
        except Exception:
            log.exception("%s cannot be brought or taken away; trying again", name)

    async def _bring(self, name: str) -> None:
        """Starts a model that was added; one that cannot be served is not wanted any more, and the status says why."""
        self._refused.pop(name, None)
        try:
            desired = await asyncio.to_thread(read_desired, self._store, name)
            if desired is None:
                raise NotFoundError(f"nothing says which version of {name} shall be served", todo=f"svc add {name}@N")
            await self._make_room(desired.target)
            failed = await self._start(self._add(desired))
        except SvcError as error:
            failed = error
        if failed:
            self._refused[name] = str(failed)
            await asyncio.to_thread(remove_deployment, self._store, name)

    async def _make_room(self, target: Target) -> None:
        """Has idle models give way, the longest idle first, until there is memory for a version's engines.

        Those that sleep already come last: to end them frees little of a GPU, and they come back slowly then.

        Raises:
            SvcError: there is none, and nothing more to end.
        """
        while True:
            try:
                return await asyncio.to_thread(self._check_memory, [target])
            except EngineError as error:
                idle = [(idle_s, each) for each in self.all if (idle_s := each.idling.idle_s) is not None]
                longest = max(idle, key=itemgetter(0), default=None)
                if longest is not None and await longest[1].idling.sleep():
                    log.info("%s gave way to %s: %s", longest[1].name, target, error.wrong)
                elif not await self._end_asleep():
                    raise

    async def _end_asleep(self) -> bool:
        """Ends the engines of a model that sleeps, of the one that was asked least lately; whether there was one."""
        for each in sorted(self.all, key=lambda each: each.admission.idle_s, reverse=True):
            if await each.idling.end_asleep():
                log.info("%s sleeps no more, and is ended", each.name)
                return True
        return False

    async def _take_away(self, name: str) -> None:
        """Ends a model that was removed, after its last request."""
        deployment = self._all[name]
        self._router.remove(name)
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                await deployment.admission.ended()
        if task := self._tasks.pop(name, None):  # none where the model could not be ended in an earlier turn
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await deployment.pool.stop()  # tried again in the next turn where an engine does not stop
        await deployment.close()
        deployment.metrics.remove()
        del self._all[name]
        log.info("%s is served no more", name)
