"""Tests that model facts are its config's, missing facts are unknown, and no config raises an error."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.engine.model_facts import ModelFacts, read_model_facts
from tests.svc.json_values import json_values

SMOLLM2 = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def read(folder: Path, config: Any) -> ModelFacts:
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_facts(folder)


def test_context_length_and_dtype_and_head_counts_are_read_from_the_model_config(tmp_path: Path) -> None:
    facts = read(tmp_path, SMOLLM2)
    assert (facts.context, facts.dtype, facts.heads, facts.kv_heads) == (8192, "bfloat16", 9, 3)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"])
def test_mixture_of_experts_model_is_recognized_by_its_config(tmp_path: Path, key: str) -> None:
    assert read(tmp_path, {**SMOLLM2, key: 8}).experts
    assert read(tmp_path, {"text_config": {**SMOLLM2, key: 8}}).experts


@pytest.mark.parametrize("said", [{}, {"num_experts": 1}, {"num_experts": 0}, {"num_experts": None}])
def test_dense_model_is_not_treated_as_a_mixture_of_experts(tmp_path: Path, said: dict[str, Any]) -> None:
    assert not read(tmp_path, {**SMOLLM2, **said}).experts


def test_kv_cache_size_per_token_includes_a_key_and_a_value_per_layer(tmp_path: Path) -> None:
    assert read(tmp_path, SMOLLM2).token_bytes == 2 * 30 * 3 * 64 * 2


def test_explicit_head_size_in_the_config_is_used(tmp_path: Path) -> None:
    assert read(tmp_path, {**SMOLLM2, "head_dim": 128}).token_bytes == 2 * 30 * 3 * 128 * 2


def test_all_attention_heads_are_kv_heads_when_the_config_does_not_set_kv_heads(tmp_path: Path) -> None:
    config = {key: value for key, value in SMOLLM2.items() if key != "num_key_value_heads"}
    assert read(tmp_path, config).kv_heads == 9


def test_text_config_of_a_multimodal_model_is_used(tmp_path: Path) -> None:
    assert read(tmp_path, {"text_config": SMOLLM2, "dtype": "float16"}).kv_heads == 3


def test_weight_size_is_the_total_size_of_the_weight_files(tmp_path: Path) -> None:
    for number, size in enumerate((100, 20)):
        (tmp_path / f"model-{number}.safetensors").write_bytes(b"x" * size)
    assert read(tmp_path, SMOLLM2).weights == 120


@pytest.mark.parametrize(("ranks", "divides"), [(1, True), (2, False), (3, True), (9, False)])
def test_tensor_parallel_ranks_must_divide_all_heads(tmp_path: Path, ranks: int, divides: bool) -> None:
    assert read(tmp_path, SMOLLM2).divides(ranks) is divides


@pytest.mark.parametrize(("group_size", "divides"), [(64, True), (128, False), (-1, True)])
def test_tensor_parallel_ranks_must_not_split_quantization_groups(
    tmp_path: Path, group_size: int, divides: bool
) -> None:
    config = {**SMOLLM2, "quantization_config": {"bits": 4, "group_size": group_size}}
    assert read(tmp_path, config).divides(3) is divides


@pytest.mark.parametrize("content", ["", "[]", "no json", "null"])
def test_corrupt_model_config_yields_no_information_about_the_model(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert read_model_facts(tmp_path) == ModelFacts()


def test_missing_model_folder_yields_empty_model_facts(tmp_path: Path) -> None:
    assert read_model_facts(tmp_path / "none") == ModelFacts()


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from([*SMOLLM2, "text_config", "quantization_config", "head_dim"]), json_values))
def test_any_model_config_can_be_parsed(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> None:
    facts = read(tmp_path_factory.getbasetemp(), config)
    assert facts.token_bytes is None or facts.token_bytes > 0
    assert facts.divides(1) or facts.heads is not None
