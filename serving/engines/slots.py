"""Where the engines of one home are: their processes and folders, by number."""

import asyncio
from collections.abc import Callable, Collection

from serving.engines.served_model import ServedModel
from svc.engine.capabilities import Capabilities
from svc.engine.orphans import end_engine
from svc.engine.vllm.folders import socket_folder, state_folder, state_folders
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.process import EngineProcess
from svc.settings import Settings


class EngineSlots:
    """The engines of one home, by number.

    Args:
        served: the models that are served, or shall be once their engines have started: they share the machine.

    Attributes:
        turn: held while an engine starts: engines on one device start one after the other.
    """

    def __init__(
        self, settings: Settings, capabilities: Capabilities, *, served: Callable[[], Collection[str]]
    ) -> None:
        self.settings = settings
        self._capabilities = capabilities
        self._served = served
        self.turn = asyncio.Lock()

    def engine(self, number: int, name: str, model: ServedModel) -> EngineProcess:
        """An unstarted engine for a model."""
        return EngineProcess(self.spec(number, name, model), silence_s=self.settings.serve.request_timeout_s)

    def numbers(self) -> list[int]:
        """Engines that may have been left running."""
        return list(state_folders(self.settings.home))

    def end(self, number: int) -> None:
        """Ends one of them."""
        end_engine(state_folder(self.settings.home, number))

    def spec(self, number: int, name: str, model: ServedModel) -> EngineSpec:
        """How an engine for a model is started.

        Args:
            name: what it calls its model.
        """
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
