"""Starts and finds the engines of one home by number, and tells whether this machine has memory for more.

The rest of the server reaches processes, the machine's memory and its device only through this module.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
from itertools import chain
from pathlib import Path

from serving.replicas.served_model import ServedModel, served_model
from svc.engine.device import DeviceCapabilities
from svc.engine.engine import LastingEngine
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.orphans import end_engine
from svc.engine.probes import EngineFacts, engine_facts
from svc.engine.vllm.folders import socket_folder, state_folder, state_folders
from svc.engine.vllm.headroom import shortage
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.process import EngineProcess
from svc.registry.registry import Registry
from svc.settings import Settings
from svc.version import Target

Served = Callable[[], Collection[str]]
MakeSlots = Callable[[Settings, Registry, DeviceCapabilities, Served], "EngineSlots"]


class EngineSlots:
    """The engines of one home, by number.

    Args:
        served: returns the models that are served, or will be once their engines have started: all share the machine.

    Attributes:
        turn: lock held while an engine starts, since engines on one device must start one after the other.
    """

    def __init__(
        self, settings: Settings, registry: Registry, capabilities: DeviceCapabilities, served: Served
    ) -> None:
        self.settings = settings
        self._registry = registry
        self._capabilities = capabilities
        self._served = served
        self.turn = asyncio.Lock()

    def engine(self, number: int, name: str, model: ServedModel) -> LastingEngine:
        """Return an unstarted engine for a model."""
        return EngineProcess(self.spec(number, name, model))

    def numbers(self) -> list[int]:
        """Return the numbers of engines that an earlier server may have left running; reads the disk."""
        return list(state_folders(self.settings.home))

    def end(self, number: int) -> None:
        """Stop the engine with this number; blocks for some seconds."""
        end_engine(state_folder(self.settings.home, number))

    def shortage(self, engines: Mapping[Target, int]) -> str | None:
        """Return a description of the memory that is missing for more engines; None if there is enough.

        Args:
            engines: number of additional engines with each version.

        Raises:
            NotFoundError, RefusedError, IntegrityError: see serving.replicas.served_model.
        """
        return shortage([*chain.from_iterable([self._spec_for(target)] * count for target, count in engines.items())])

    def capabilities(self, target: Target) -> EngineCapabilities:
        """Return the capabilities of an engine that starts with a version; reads the disk and raises as `shortage`."""
        return self._spec_for(target).engine_capabilities

    def facts(self, name: str, folder: Path) -> EngineFacts:
        """Return the kind of engine that serves a model folder under a name."""
        return engine_facts(self.settings.engine_for(name), self._capabilities, folder)

    def _spec_for(self, target: Target) -> EngineSpec:
        name = target.version.name
        return self.spec(0, name, served_model(self._registry, target, self.settings.adapters))

    def spec(self, number: int, name: str, model: ServedModel) -> EngineSpec:
        """Return the specification for starting an engine with a model; `name` is the model's name in the engine."""
        home, served = self.settings.home, {*self._served(), name}
        return EngineSpec(
            model=model.folder,
            served_name=name,
            runtime=socket_folder(home, number),
            state=state_folder(home, number),
            log=home / "logs" / f"engine-{number}.log",
            cache=home / "cache" / "vllm",
            capabilities=self._capabilities,
            settings=self.settings.engine_for(name),
            template_kwargs=model.template_kwargs,
            lora=model.lora,
            engines=sum(self.settings.engine_for(each).replicas for each in served),
            idles=self.settings.idle_s_of(name) is not None,
        )
