"""Tests bases with scaled positions, with the configs that published models have."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from svc.engine.model_facts import read_model_facts
from svc.errors import BaseModelError
from svc.settings.settings import Settings
from tests.trainer.conftest import make_model
from trainer.base_model.find_base import find_base, find_config, folder_with_rope, revision_with_rope
from trainer.model.config import load_config
from trainer.recipe.rope import RopeScaling, RopeType

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def scaling(kind: str = "yarn", factor: float = 4, **options: Any) -> RopeScaling:
    return RopeScaling(type=RopeType(kind), factor=factor, **options)


def base_with(folder: Path, **config: Any) -> Path:
    """Return a folder with the config of a published Llama, in the older form."""
    folder.mkdir()
    plain = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(plain | {"rope_theta": 10000.0} | config), "utf-8")
    return folder


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    return result


@pytest.mark.parametrize("kind", RopeType)
def test_rope_scaling_extends_the_context_by_its_factor_in_training_and_in_the_engine(
    kind: RopeType, tmp_path: Path
) -> None:
    base = base_with(tmp_path / "base")
    changed = folder_with_rope(base, scaling(kind), tmp_path / "cache")
    config = load_config(changed)
    assert config.max_position_embeddings == 8192
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == (kind, 4)
    assert config.rope_parameters["rope_theta"] == 10000
    assert read_model_facts(changed).context == 8192


@pytest.mark.slow
@pytest.mark.parametrize("kind", RopeType)
def test_rope_scaling_gives_the_same_logits_as_a_model_config_with_that_scaling(kind: RopeType, tmp_path: Path) -> None:
    rope = {"rope_type": str(kind), "factor": 4.0, "rope_theta": 10000.0}
    if kind is RopeType.YARN:
        rope["original_max_position_embeddings"] = 2048
    base = make_model(tmp_path / "base")
    own = make_model(tmp_path / "own", rope_parameters=rope, max_position_embeddings=8192)
    changed, ids = folder_with_rope(base, scaling(kind), tmp_path / "cache"), torch.arange(64)[None]
    assert torch.equal(logits(changed, ids), logits(own, ids))
    assert not torch.allclose(logits(changed, ids), logits(base, ids), atol=1e-3)


@pytest.mark.slow
def test_linear_rope_scaling_by_4_is_undone_by_multiplying_the_positions_by_4(tiny_base: Path, tmp_path: Path) -> None:
    changed = folder_with_rope(tiny_base, scaling("linear"), tmp_path)
    ids, steps = torch.arange(20)[None], 4 * torch.arange(20)[None]
    base, longer = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (tiny_base, changed))
    with torch.no_grad():
        assert torch.allclose(base(ids).logits, longer(ids, position_ids=steps).logits, atol=1e-5)


def test_tokenizer_maximum_length_grows_with_the_context(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text("utf-8"))
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 2048}), "utf-8")
    changed = folder_with_rope(base, scaling(), tmp_path / "cache")
    assert AutoTokenizer.from_pretrained(changed).model_max_length == 8192


def test_base_that_already_has_rope_scaling_is_rejected_unless_replace_is_set(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", rope_scaling=LLAMA_3, max_position_embeddings=131072)
    with pytest.raises(BaseModelError, match=r"already uses RoPE scaling: llama3 with factor 8\.0"):
        folder_with_rope(base, scaling(), tmp_path)
    config = load_config(folder_with_rope(base, scaling(factor=16, replace=True), tmp_path))
    assert config.max_position_embeddings == 131072
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["original_max_position_embeddings"] == 8192


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "no rotary position embeddings"),
        (
            {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]},
            "different rotary position embeddings for each kind of layer",
        ),
    ],
)
def test_base_with_missing_or_mixed_rotary_embeddings_is_rejected(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    base = base_with(tmp_path / "base", **config)
    with pytest.raises(BaseModelError, match=reason):
        folder_with_rope(base, scaling(), tmp_path)


def test_rope_scaling_changes_the_config_and_the_revision_of_a_base(tiny_base: Path, tmp_path: Path) -> None:
    settings, plain = Settings(home=tmp_path, base_cache=tmp_path / "cache"), str(tiny_base)
    base = find_base(plain, settings, None, scaling())
    assert load_config(base.folder).max_position_embeddings == 4 * load_config(tiny_base).max_position_embeddings
    assert base.revision == revision_with_rope(find_base(plain, settings).revision, scaling())
    assert find_config(plain, settings, None, scaling()) == base.folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", RopeType)
def test_engine_and_training_compute_identical_rotary_embeddings(
    kind: RopeType, tiny_base: Path, tmp_path: Path
) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    config = load_config(folder_with_rope(tiny_base, scaling(kind), tmp_path))
    length, head = config.max_position_embeddings, config.hidden_size // config.num_attention_heads
    with set_current_vllm_config(VllmConfig()):
        engine = get_rope(head, length, rope_parameters=config.rope_parameters, dtype=torch.float32)
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    for part, trained in zip(engine.cos_sin_cache[:length].chunk(2, dim=-1), expected, strict=True):
        assert torch.equal(part, trained[0, :, : head // 2])
