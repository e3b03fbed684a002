"""Tests that PyTorch's 4-bit kernel in vLLM matches gptqmodel's dequantized log-probabilities on any CPU."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from svc.engine.device import DeviceCapabilities
from svc.engine.vllm.folders import runtime_folder
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.process import EngineProcess
from svc.settings.engine import EngineSettings, GptqKernel
from svc.settings.settings import Settings
from tests.e2e.conftest import Report
from tests.e2e.gptq_reference import RESULT, START, Logprobs, sequences
from tests.e2e.tiny_model import build_tiny_model

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two models that differ in all but the embedding, which the engine shares with the output layer."""
    from safetensors.torch import load_file, save_file

    from trainer.base_model.resolve import resolve_base

    folder = tmp_path_factory.mktemp("kernel")
    tokenizer = resolve_base("smollm2-135m-instruct", Settings().base_cache).folder
    one, other = (build_tiny_model(folder / f"base-{seed}", tokenizer, seed) for seed in (0, 1))
    weights = load_file(other / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = load_file(one / "model.safetensors")[name]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    return one, other


def refer(base: Path, out: Path, group_size: int) -> dict[str, Logprobs]:
    """Quantize a base and return the results of its dequantized weights, keyed by torch's data type name."""
    command = [sys.executable, "-m", "tests.e2e.gptq_reference", str(base), str(out), str(group_size)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    logprobs: dict[str, Logprobs] = json.loads((out / RESULT).read_text("utf-8"))
    return logprobs


def distance(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Return the mean absolute difference of two sets of log-probabilities, in nats."""
    return fmean(abs(a - b) for row, others in zip(one, other, strict=True) for a, b in zip(row, others, strict=True))


@asynccontextmanager
async def engine_with(model: Path, home: Path, capabilities: DeviceCapabilities) -> AsyncIterator[EngineProcess]:
    """Yield an engine that uses PyTorch's 4-bit kernel."""
    settings = EngineSettings(gptq_kernel=GptqKernel.TORCH, max_model_len=256, max_concurrency=8)
    spec = EngineSpec(
        model=model,
        served_name="tiny",
        runtime=runtime_folder(home, "kernel"),
        state=home,
        log=home / "engine.log",
        cache=home / "cache",
        capabilities=capabilities,
        settings=settings,
    )
    engine = EngineProcess(spec)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()


async def measure(engine: EngineProcess) -> Logprobs:
    return [list(await engine.client.logprobs(ids, START)) for ids in sequences()]


@pytest.mark.parametrize(
    "group_size",
    [32, *(pytest.param(size, marks=pytest.mark.matrix) for size in (64, 128, -1))],
)
async def test_gptq_log_probabilities_match_those_of_dequantized_weights_even_after_reloads(
    bases: tuple[Path, Path], capabilities: DeviceCapabilities, tmp_path: Path, report: Report, group_size: int
) -> None:
    """Needs the real engine: the kernel that is tested runs inside it."""
    folders = [tmp_path / f"gptq-{number}" for number in range(len(bases))]
    references = [refer(base, folder, group_size) for base, folder in zip(bases, folders, strict=True)]
    exact, rounded = ([reference[f"torch.{dtype}"] for reference in references] for dtype in ("float32", "bfloat16"))
    async with engine_with(folders[0], tmp_path, capabilities) as engine:
        first = await measure(engine)
        await engine.client.reload_weights(folders[1])
        await engine.client.reset_prefix_cache()
        other = await measure(engine)
        await engine.client.reload_weights(folders[0])
        await engine.client.reset_prefix_cache()
        again = await measure(engine)
    assert "Using Int4LinearKernel" in (tmp_path / "engine.log").read_text()
    assert again == first
    errors: list[Any] = [distance(first, exact[0]), distance(other, exact[1])]
    bf16 = [distance(*pair) for pair in zip(rounded, exact, strict=True)]
    report(
        f"groups of {group_size}: {errors[0]:.4f} and, reloaded, {errors[1]:.4f} nats from the dequantized weights; "
        f"transformers in bfloat16 {bf16[0]:.4f} and {bf16[1]:.4f}; other weights {distance(first, exact[1]):.2f}"
    )
    assert all(ours <= 1.5 * theirs for ours, theirs in zip(errors, bf16, strict=True))
