"""Tests that unusable bases are rejected before training. vLLM's validation is stubbed except in one test."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from svc.errors import BaseModelError, EngineError, IntegrityError, RecipeError, SvcError, TrainingError
from svc.settings.engine import EngineSettings
from tests.svc.engine.devices import AVX2, AVX512
from tests.trainer.conftest import make_recipe
from trainer.base_model.vllm_check import model_check
from trainer.pipeline import preflight
from trainer.pipeline.preflight import check_base

RECIPE = {"quantize": {"group_size": 32}}


class _Passed:
    def wait(self) -> None:
        """Return without reporting a fault."""


@contextmanager
def _vllm_agrees(folder: Path, settings: EngineSettings) -> Iterator[_Passed]:
    yield _Passed()


def check(base: Path, **sections: Any) -> None:
    check_base(base, make_recipe(**(RECIPE | sections)), AVX512, EngineSettings())


def change_json(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changed), "utf-8")


def cut_shard(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def untie(base: Path) -> None:
    path = base / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": torch.randn_like(tensors["model.embed_tokens.weight"])}, path)


def no_end(base: Path) -> None:
    for name, changed in (
        ("config.json", {"eos_token_id": None}),
        ("generation_config.json", {"eos_token_id": None}),
        ("tokenizer_config.json", {"eos_token": None}),
    ):
        change_json(base / name, **changed)


FAULTS: dict[str, tuple[Callable[[Path], None], type[SvcError], str]] = {
    "fewer embedding rows than ids": (
        lambda base: change_json(base / "config.json", vocab_size=257),
        BaseModelError,
        "has id 257, but the model has 257 embedding rows",
    ),
    "impossible config": (
        lambda base: change_json(base / "config.json", num_attention_heads=3),
        BaseModelError,
        "transformers cannot read",
    ),
    "no language model": (
        lambda base: change_json(base / "config.json", model_type="vit"),
        BaseModelError,
        "has model_type 'vit', for which transformers has no causal language model",
    ),
    "damaged shard": (cut_shard, IntegrityError, "is not a complete safetensors file"),
    "two output matrices": (untie, BaseModelError, "its files contain two different matrices"),
    "no end token": (no_end, BaseModelError, "does not specify a token that ends an answer"),
    "tokenizer with code": (
        lambda base: change_json(
            base / "tokenizer_config.json",
            tokenizer_class="Homemade",
            auto_map={"AutoTokenizer": ["tokenization.Homemade", None]},
        ),
        BaseModelError,
        "cannot read the tokenizer",
    ),
}


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(preflight, "model_check", _vllm_agrees)
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def test_complete_base_passes_preflight(base: Path) -> None:
    check(base)


@pytest.mark.parametrize(("plant", "error", "wrong"), FAULTS.values(), ids=FAULTS)
def test_base_that_would_fail_in_a_later_stage_is_rejected_by_preflight(
    base: Path, plant: Callable[[Path], None], error: type[SvcError], wrong: str
) -> None:
    plant(base)
    with pytest.raises(error) as raised:
        check(base)
    assert wrong in raised.value.wrong


def test_context_length_is_rejected_when_vllm_would_use_long_rope_factors(base: Path) -> None:
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    scaling = {"type": "longrope", "original_max_position_embeddings": 4096, **factors}
    change_json(base / "config.json", rope_scaling=scaling, rope_parameters=None, max_position_embeddings=131072)
    recipe = make_recipe(**RECIPE)
    check_base(base, recipe, AVX512, EngineSettings(max_model_len=4096))
    with pytest.raises(
        BaseModelError, match=r"With engine\.max_model_len: 4097, vLLM uses the factors for longer texts"
    ):
        check_base(base, recipe, AVX512, EngineSettings(max_model_len=4097))


@pytest.mark.slow
def test_pissa_rank_larger_than_the_smallest_layer_dimension_is_rejected(base: Path) -> None:
    check(base, adapter={"init": "pissa", "rank": 32})
    check(base, adapter={"init": "gaussian", "rank": 64})
    with pytest.raises(RecipeError, match=r"adapter\.rank is 64, but model\.layers\.0\.self_attn\.k_proj") as raised:
        check(base, adapter={"init": "pissa", "rank": 64})
    assert "a rank of at most 32" in str(raised.value)


def test_group_size_that_divides_no_layer_width_is_rejected(base: Path) -> None:
    with pytest.raises(RecipeError, match=r"quantize\.group_size is 128"):
        check(base, quantize={"group_size": 128})


def test_awq_is_rejected_on_machines_with_slow_bfloat16(base: Path) -> None:
    with pytest.raises(TrainingError, match="supports AWQ in bfloat16 only"):
        check_base(base, make_recipe(**RECIPE, formats=["awq"]), AVX2, EngineSettings())


@pytest.mark.slow
def test_fp8_is_rejected_on_machines_where_the_engine_would_take_seconds_per_token(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(base, formats=["fp8"])
    monkeypatch.setattr("svc.engine.device._MAX_FP8_WEIGHTS_WITHOUT_KERNEL", 1000)
    with pytest.raises(EngineError, match=r"no fp8 kernel for .+ per token"):
        check(base, formats=["fp8"])
    check(base, formats=["int8"])


def test_architecture_unsupported_by_gptqmodel_is_rejected(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptqmodel.models.auto.SUPPORTED_MODELS", ["qwen3"])
    with pytest.raises(TrainingError, match=r"gptqmodel .+ cannot quantize 'llama'"):
        check(base)
    check(base, formats=["merged"])


@pytest.mark.slow
def test_architecture_unsupported_by_vllm_is_rejected_with_the_reason_given_by_vllm(
    tiny_base: Path, tmp_path: Path
) -> None:
    """Uses the installed vLLM. Every end-to-end training shows that supported architectures pass."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    change_json(base / "config.json", architectures=["RwkvForCausalLM"], model_type="rwkv")
    with model_check(base, EngineSettings()) as asked, pytest.raises(BaseModelError) as raised:
        asked.wait()
    assert "Model architectures ['RwkvForCausalLM'] are not supported" in raised.value.wrong
