"""Starts a home folder's engines, looks them up by number, and checks whether there is memory for more engines.

Engine numbers are unique across models, and an engine's folder and log are named after its number. The
rest of the server reaches processes, a Ray cluster, the machine's memory and its device only through this module.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from itertools import chain, count
from pathlib import Path

from serving.engines.ray.engine import RayEngine
from serving.engines.ray.machines import RayMachines
from serving.engines.ray.record import end_actor, end_postponed
from serving.engines.served_model import ServedModel, served_model
from svc.engine.device import DeviceCapabilities
from svc.engine.engine import LastingEngine
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.orphans import end_engine
from svc.engine.probes import EngineFacts, engine_facts
from svc.engine.vllm.folders import all_states, socket_folder, state_folder, state_folders
from svc.engine.vllm.headroom import shortage
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.process import EngineProcess
from svc.errors import EngineError
from svc.registry.registry import Registry
from svc.settings.engine import EngineSettings, Launcher
from svc.settings.settings import Settings
from svc.version import Target

log = logging.getLogger(__name__)

_END_PAUSES_S = (5.0, 10.0, 20.0, 40.0, 60.0)
"""Pauses between attempts to stop Ray actors whose cluster was unreachable, in seconds. The last pause is repeated."""

Served = Callable[[], Collection[str]]
MakeSlots = Callable[[Settings, Registry, DeviceCapabilities, Served], "EngineSlots"]


class EngineSlots:
    """Numbered slots for the engines of one home folder.

    Args:
        served: function that returns all models that are served on this machine, or will be once their engines
            have started.

    Attributes:
        turn: lock held while an engine starts, since engines on one device must start one after another.
    """

    def __init__(
        self, settings: Settings, registry: Registry, capabilities: DeviceCapabilities, served: Served
    ) -> None:
        self.settings = settings
        self._registry = registry
        self._capabilities = capabilities
        self._served = served
        self._ray = RayMachines(settings, registry.models)
        self._taken: set[int] = set()
        self.turn = asyncio.Lock()

    def engine(self, number: int, name: str, model: ServedModel) -> LastingEngine:
        """Return an engine for a model without starting it."""
        spec = self.spec(number, name, model)
        if spec.settings.launcher is Launcher.RAY:
            return RayEngine(spec, self._ray.placement(spec.settings))
        return EngineProcess(spec)

    def take(self, number: int | None = None) -> int:
        """Reserve a replica number for an engine and return it.

        Args:
            number: number of an orphaned engine to take over, or None for the lowest free number.

        Raises:
            ValueError: another engine already has this number.
        """
        if number is None:
            number = next(number for number in count() if number not in self._taken)
        elif number in self._taken:
            raise ValueError(f"engine number {number} is already in use")
        self._taken.add(number)
        return number

    def give_back(self, number: int) -> None:
        """Release an engine's replica number after the engine has stopped."""
        self._taken.discard(number)

    async def orphans(self) -> list[int]:
        """Return the numbers (ids) of engines that an earlier server left running and this one has not taken over."""
        return [number for number in await asyncio.to_thread(self.numbers) if number not in self._taken]

    async def end_orphans(self) -> None:
        """Stop the engines that an earlier server left running and this server has not taken over."""
        for number in await self.orphans():
            await asyncio.to_thread(self.end, number)

    def numbers(self) -> list[int]:
        """Return the numbers (ids) of engines that an earlier server may have left running. This reads from disk."""
        return list(state_folders(self.settings.home))

    def end(self, number: int) -> None:
        """Stop the engine with the given number. This blocks for several seconds."""
        folder = state_folder(self.settings.home, number)
        end_engine(folder)
        end_actor(folder)

    async def end_postponed(self) -> None:
        """Keep trying, until cancelled, to stop Ray actors that could not be stopped because their cluster was
        unreachable.
        """
        failures = 0
        while True:
            await asyncio.sleep(_END_PAUSES_S[min(failures, len(_END_PAUSES_S) - 1)])
            try:
                ended, left = await asyncio.to_thread(end_postponed, all_states(self.settings.home))
            except OSError:
                log.exception("could not read the list of actors to stop")
                continue
            if ended:
                log.info("the Ray cluster can be reached again; stopped the actors left on it: %s", ", ".join(ended))
            failures = failures + 1 if left else 0

    async def shortage(self, engines: Mapping[Target, int]) -> str | None:
        """Return a message stating which resources are insufficient to start more engines, or None if there are enough.

        On this machine, the limiting resource is memory. In a Ray cluster, it is the resources that an engine reserves;
        if the cluster adds machines on demand, this waits up to `ray.wait_s` for them.

        Args:
            engines: number of additional engines, keyed by the target that they would serve.

        Raises:
            EngineError: the Ray cluster cannot be reached.
            NotFoundError, RefusedError, IntegrityError: see serving.engines.served_model.
        """
        here, on_ray = await asyncio.to_thread(self._shortage_here, engines)
        return here or (await self._ray.shortage(on_ray) if on_ray else None)

    def _shortage_here(self, engines: Mapping[Target, int]) -> tuple[str | None, list[EngineSettings]]:
        """Check the memory for the engines that would run on this machine.

        Returns:
            The shortage and the settings of the engines that would run in a Ray cluster instead. The shortage is a
            message stating how much memory is needed and how much is free, or None if there is enough.
        """
        specs = [*chain.from_iterable([self._spec_for(target)] * number for target, number in engines.items())]
        on_ray = [spec.settings for spec in specs if spec.settings.launcher is Launcher.RAY]
        return shortage([spec for spec in specs if spec.settings.launcher is Launcher.LOCAL]), on_ray

    async def require_memory(self, engines: Mapping[Target, int]) -> None:
        """Check that there is enough memory for additional engines.

        Args:
            engines: see `shortage`.

        Raises:
            EngineError: not enough memory is free. The message states how much is needed and how much is free.
            NotFoundError: there is no such version or format.
        """
        missing = await self.shortage(engines)
        if missing:
            raise EngineError(
                f"not enough memory for {', '.join(str(target) for target in engines)}: {missing}",
                todo="serve fewer models, or reduce their `max_model_len` or `replicas` under `models` in svc.yaml",
            )

    def first_engines(self, name: str) -> int:
        """Return the number of engines that a model starts with. Engines may be added later if the load requires it."""
        return self.settings.engine_for(name).replica_range.min

    def capabilities(self, target: Target) -> EngineCapabilities:
        """Return the capabilities of an engine that is started with the given target.

        This reads from disk and raises the same errors as `shortage`.
        """
        return self._spec_for(target).engine_capabilities

    def facts(self, name: str, folder: Path) -> EngineFacts:
        """Return the kind of engine that would serve a model folder under the given name."""
        settings = self.settings.engine_for(name)
        return engine_facts(settings, self._capabilities_for(settings), folder)

    def _capabilities_for(self, settings: EngineSettings) -> DeviceCapabilities:
        return self._ray.capabilities(settings) if settings.launcher is Launcher.RAY else self._capabilities

    def _spec_for(self, target: Target) -> EngineSpec:
        name = target.version.name
        return self.spec(0, name, served_model(self._registry, target, self.settings.adapters))

    def spec(self, number: int, name: str, model: ServedModel) -> EngineSpec:
        """Return the specification for starting an engine that serves a model under `name`."""
        home, served, settings = self.settings.home, {*self._served(), name}, self.settings.engine_for(name)
        return EngineSpec(
            model=model.folder,
            served_name=name,
            runtime=socket_folder(home, number),
            state=state_folder(home, number),
            log=home / "logs" / f"engine-{number}.log",
            cache=home / "cache" / "vllm",
            capabilities=self._capabilities_for(settings),
            settings=settings,
            template_kwargs=model.template_kwargs,
            lora=model.lora,
            engines=self._sharing(served) if settings.launcher is Launcher.LOCAL else 1,
            idles=self.settings.idle_s_of(name) is not None,
        )

    def _sharing(self, served: Collection[str]) -> int:
        """Return the number of engines that share this machine at peak load."""
        every = [self.settings.engine_for(name) for name in served]
        return sum(each.replica_range.max for each in every if each.launcher is Launcher.LOCAL)
