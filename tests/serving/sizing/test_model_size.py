"""Tests sizes that are read from published models' configs."""

from pathlib import Path

import pytest

from serving.sizing.model_size import read_model_size
from svc.errors import SettingsError
from tests.trainer.estimate.configs import FOLDER


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        # From the publishers' model cards or the sizes of their files.
        ("llama-3.2-1b", 1.24),
        ("llama-3.1-8b", 8.03),
        ("llama-2-70b", 68.98),
        ("qwen2.5-7b", 7.62),
        ("phi-4", 14.66),
        ("r1-qwen-32b", 32.76),
        ("mixtral-8x7b", 46.7),
    ],
)
def test_parameter_count_matches_the_published_count(name: str, billions: float) -> None:
    assert read_model_size(str(FOLDER / name), None).parameters == pytest.approx(billions * 1e9, rel=0.005)


def test_active_parameters_of_a_moe_model_include_only_the_experts_used_per_token() -> None:
    assert read_model_size(str(FOLDER / "mixtral-8x7b"), None).active == pytest.approx(12.9e9, rel=0.01)


def test_model_size_without_a_config_assumes_the_kv_cache_of_a_typical_model() -> None:
    published = read_model_size(str(FOLDER / "llama-3.1-8b"), None)
    assert read_model_size("8b", None).token_bytes == published.token_bytes


def test_fewer_bits_reduce_the_weight_size_but_not_the_kv_cache_size() -> None:
    four, sixteen = read_model_size("8b", 4), read_model_size("8b", None)
    assert (four.weight_bytes, four.token_bytes) == (sixteen.weight_bytes / 4, sixteen.token_bytes)


@pytest.mark.parametrize("model", ["big", "0b", "/nowhere"])
def test_reading_the_size_of_an_unknown_model_raises_a_settings_error(model: str) -> None:
    with pytest.raises(SettingsError):
        read_model_size(model, None)


def test_config_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "hidden_size": 8}')
    with pytest.raises(SettingsError, match="num_hidden_layers"):
        read_model_size(str(tmp_path), None)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 0, "vocab_size": 9}',
        '{"hidden_size": "64", "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 9}',
        '{"hidden_size": 8, "num_hidden_layers": -2, "num_attention_heads": 4, "vocab_size": 1, '
        '"intermediate_size": 9}',
    ],
)
def test_config_with_impossible_values_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SettingsError, match=r"config\.json"):
        read_model_size(str(tmp_path), None)
