"""Tests the sizes of published models derived only from their config.json."""

import json
from pathlib import Path

import pytest

from svc.errors import BaseModelError
from tests.trainer.estimate.configs import published
from trainer.estimate.model_shape import read_model_shape
from trainer.recipe.targets import Targets


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen2.5-7b", 7_615_616_512),
        ("mistral-7b", 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_parameter_counts_match_published_weights(name: str, parameters: int) -> None:
    assert published(name).parameters == parameters


def test_mixtral_estimate_counts_two_of_eight_experts_per_token() -> None:
    shape = published("mixtral-8x7b")
    assert shape.experts_share == 2 / 8
    assert shape.used_weights + 2 * shape.head == pytest.approx(12.88e9, rel=0.01)  # 12.9B active, as published


def test_output_head_is_not_counted_as_an_adapted_layer() -> None:
    assert len(published("llama-2-7b").targets) == 7 * 32


def test_adapter_size_includes_only_the_layers_in_the_target_preset() -> None:
    assert len(published("llama-2-7b", Targets.ATTENTION_MIN).targets) == 2 * 32


def test_unknown_architecture_is_estimated_like_llama_and_a_note_is_added(tmp_path: Path) -> None:
    widths = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "brand-new", **widths}))
    shape = read_model_shape(tmp_path)
    assert shape.parameters > 0
    assert "brand-new" in shape.notes[0]


def test_config_without_a_hidden_size_is_rejected_with_an_error_naming_the_key(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "brand-new", "vocab_size": 5}')
    with pytest.raises(BaseModelError, match="hidden_size"):
        read_model_shape(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "not json"])
def test_invalid_config_json_raises_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BaseModelError):
        read_model_shape(tmp_path)
