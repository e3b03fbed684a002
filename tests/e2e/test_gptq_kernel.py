"""PyTorch's 4-bit kernel inside vLLM, on any CPU: the log-probabilities of gptqmodel's own dequantized weights."""

import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, chdir
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pytest

from svc.dataset.reader import read_examples
from svc.engine.capabilities import read_capabilities
from svc.engine.launch import EngineSpec
from svc.engine.process import EngineProcess
from svc.engine.runtime import runtime_folder
from svc.settings import EngineSettings, GptqKernel, Settings
from tests.e2e.conftest import DATA, Report
from tests.e2e.tiny_model import build_tiny_model

if TYPE_CHECKING:
    import torch

pytestmark = [
    pytest.mark.slow,
    # gptqmodel leaves a temporary folder to the collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

Logprobs = list[tuple[float, ...]]
_SEQUENCES, _LENGTH, _START = 8, 60, 20


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models that differ in all but their embedding, which the engine shares with the output."""
    from safetensors.torch import load_file, save_file

    from trainer.base_model import resolve_base

    folder = tmp_path_factory.mktemp("kernel")
    tokenizer = resolve_base("smollm2-135m-instruct", Settings().base_cache).folder
    one, other = (build_tiny_model(folder / f"base-{seed}", tokenizer, seed) for seed in (0, 1))
    weights = load_file(other / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = load_file(one / "model.safetensors")[name]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    return one, other


def quantize(base: Path, out: Path, group_size: int) -> Path:
    """With gptqmodel directly, because no recipe asks for whole channels (-1)."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default is too small for two cores
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    examples = [example.question for example in read_examples(DATA / "train.jsonl")[:8]]
    config = QuantizeConfig(bits=4, group_size=group_size, desc_act=False, act_group_aware=group_size > 0)
    model = GPTQModel.load(str(base), config)
    out.mkdir()
    with chdir(out):  # gptqmodel leaves a folder of logs where it is called
        model.quantize(examples, batch_size=4, calibration_data_min_length=1)
        model.save(str(out))
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def sequences() -> list[list[int]]:
    chosen = random.Random(0)
    return [[chosen.randrange(10, 40_000) for _ in range(_LENGTH)] for _ in range(_SEQUENCES)]


def dequantized(base: Path, quantized: Path) -> dict[str, "torch.Tensor"]:
    """Every quantized layer's weights, [out, in] in float32, by name."""
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    model = GPTQModel.load(str(quantized), backend=BACKEND.GPTQ_TORCH, device="cpu").model
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TorchLinear)}
    with torch.no_grad():
        # The class's own function: a layer's is compiled, for which a compiler would be needed.
        return {name: TorchLinear.dequantize_weight(layer).T.float() for name, layer in layers.items()}


def logprobs_of(base: Path, weights: dict[str, "torch.Tensor"], dtype: "torch.dtype") -> Logprobs:
    """What transformers gives for the base with other weights in its layers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    found = []
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight)
        for ids in sequences():
            scores = model(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
            found.append(tuple(float(scores[place - 1, ids[place]]) for place in range(_START, _LENGTH)))
    return found


def distance(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Mean absolute difference, nats."""
    return fmean(abs(a - b) for row, others in zip(one, other, strict=True) for a, b in zip(row, others, strict=True))


@asynccontextmanager
async def engine_with(model: Path, home: Path) -> AsyncIterator[EngineProcess]:
    """An engine that is told to take PyTorch's kernel."""
    settings = EngineSettings(gptq_kernel=GptqKernel.TORCH, max_model_len=256, max_concurrency=8)
    spec = EngineSpec(
        model=model,
        served_name="tiny",
        runtime=runtime_folder(home, "kernel"),
        state=home,
        log=home / "engine.log",
        cache=home / "cache",
        capabilities=read_capabilities(home),
        settings=settings,
    )
    engine = EngineProcess(spec)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()


async def measure(engine: EngineProcess) -> Logprobs:
    return [await engine.client.logprobs(ids, _START) for ids in sequences()]


@pytest.mark.parametrize(
    "group_size",
    [32, *(pytest.param(size, marks=pytest.mark.matrix) for size in (64, 128, -1))],
)
async def test_log_probabilities_are_those_of_the_dequantized_weights_also_after_reloads(
    bases: tuple[Path, Path], tmp_path: Path, report: Report, group_size: int
) -> None:
    import torch

    folders = [quantize(base, tmp_path / f"gptq-{number}", group_size) for number, base in enumerate(bases)]
    exact, rounded = [], []
    for base, folder in zip(bases, folders, strict=True):
        weights = dequantized(base, folder)
        exact.append(logprobs_of(base, weights, torch.float32))
        rounded.append(logprobs_of(base, weights, torch.bfloat16))
    async with engine_with(folders[0], tmp_path) as engine:
        first = await measure(engine)
        await engine.client.reload_weights(folders[1])
        await engine.client.reset_prefix_cache()
        other = await measure(engine)
        await engine.client.reload_weights(folders[0])
        await engine.client.reset_prefix_cache()
        again = await measure(engine)
    assert "Using Int4LinearKernel" in (tmp_path / "engine.log").read_text()
    assert again == first
    found: list[Any] = [distance(first, exact[0]), distance(other, exact[1])]
    bf16 = [distance(*pair) for pair in zip(rounded, exact, strict=True)]
    report(
        f"groups of {group_size}: {found[0]:.4f} and, reloaded, {found[1]:.4f} nats from the dequantized weights; "
        f"transformers in bfloat16 {bf16[0]:.4f} and {bf16[1]:.4f}; other weights {distance(first, exact[1]):.2f}"
    )
    assert all(ours <= 1.5 * theirs for ours, theirs in zip(found, bf16, strict=True))
