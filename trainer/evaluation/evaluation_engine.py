"""Creates the engine for a run's evaluations. It is configured like the server's engines, but uses no more
memory than an evaluation needs.
"""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from svc.engine.client import EngineClient
from svc.engine.device import DeviceCapabilities
from svc.engine.engine import Engine
from svc.engine.model_facts import read_model_facts
from svc.engine.state import EnginePhase
from svc.engine.vllm.folders import runtime_folder
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.process import EngineProcess
from svc.engine.vllm.user_args import given
from svc.evaluation.evaluator import CONCURRENCY
from svc.model_folder.chat_template import TemplateKwargs
from svc.registry.fingerprint import compatibility_fingerprint
from svc.settings.engine import EngineSettings
from svc.settings.settings import Settings
from svc.store.kept_requests import MOST_TOKENS
from svc.terminal import advancing

LaunchModel = Callable[..., Engine]
"""Function that creates an engine for a model folder and its `template_kwargs`, without starting it."""
_SCORED_AT_ONCE = f"--max-num-batched-tokens={MOST_TOKENS}"


def evaluation_engine(
    model: Path,
    *,
    settings: Settings,
    capabilities: DeviceCapabilities,
    run: Path,
    name: str,
    template_kwargs: TemplateKwargs,
) -> EngineProcess:
    """Create a vLLM engine process on this machine, without starting it.

    Args:
        model: folder of the model to serve.
        run: the run's folder, which contains the engine's state and log.
        name: name of the model in requests.
        template_kwargs: arguments of the model's chat template.
    """
    home, engine = settings.home, settings.engine
    # The KV cache is no larger than an evaluation needs: filling 3 GiB with zeros takes 4 s of each start.
    sequences = min(engine.max_concurrency, CONCURRENCY)
    # vLLM computes logits for all scored tokens of a step, and does not budget the memory for them.
    scored = [] if given(engine.args, "--max-num-batched-tokens") is not None else [_SCORED_AT_ONCE]
    spec = EngineSpec(
        model=model,
        served_name=name,
        runtime=runtime_folder(home, run.name),
        state=run,
        log=run / "engine.log",
        cache=home / "cache" / "vllm",
        capabilities=capabilities,
        settings=engine.model_copy(update={"max_concurrency": sequences, "args": (*engine.args, *scored)}),
        template_kwargs=template_kwargs,
    )
    return EngineProcess(spec)


def served_context(model: Path, engine: EngineSettings) -> int:
    """Return the maximum total number of tokens in a prompt and its answer on an engine that serves the model.

    Args:
        model: folder of the model.
    """
    return min(engine.max_model_len, read_model_facts(model).context or engine.max_model_len)


class ReusedEngine:
    """An engine that serves several models in turn. The next model is loaded in place if the engine supports this and
    the two models differ only in their weights. Otherwise, a new engine is started.

    Use it as a context manager to stop the engine at the end.

    Args:
        launch: creates an engine for a model.
    """

    def __init__(self, launch: LaunchModel) -> None:
        self._launch = launch
        self._engine: Engine | None = None
        self._fingerprint = ""

    async def serve(self, folder: Path, template_kwargs: TemplateKwargs) -> EngineClient:
        """Load a model and return a client for its engine. The model is loaded in place if possible,
        otherwise in a new engine.

        Raises:
            EngineError: the model could not be loaded.
        """
        fingerprint = compatibility_fingerprint(folder, template_kwargs)
        if self._engine and self._engine.capabilities.reloads and self._fingerprint == fingerprint:
            await self._engine.client.reload_weights(folder)
            await self._engine.client.reset_prefix_cache()
            return self._engine.client
        if self._engine:
            await self._engine.stop()
        self._engine, self._fingerprint = self._launch(folder, template_kwargs=template_kwargs), fingerprint
        with advancing("engine", tuple(EnginePhase)) as on_phase:
            await self._engine.start(on_phase)
        return self._engine.client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine:
            await self._engine.stop()
