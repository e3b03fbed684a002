"""The engine for a run's evaluations: like the server's, but with no more memory than an evaluation needs."""

from pathlib import Path

from svc.engine.device import DeviceCapabilities
from svc.engine.vllm.engine_args import given
from svc.engine.vllm.folders import runtime_folder
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.process import EngineProcess
from svc.evaluation.evaluator import CONCURRENCY
from svc.model_folder.chat_template import TemplateKwargs
from svc.settings import Settings
from svc.store.scores import MOST_TOKENS

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
    """Return a vLLM process on this machine, not started.

    Args:
        model: folder of the model to serve.
        run: the run's folder, for the engine's state and log.
        name: name of the model in requests.
        template_kwargs: arguments of its chat template.
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
