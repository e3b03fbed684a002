"""Tests that fingerprints are equal exactly when an in-place reload is correct."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.errors import IntegrityError
from svc.model_folder.chat_template import write_template_kwargs
from svc.registry.fingerprint import compatibility_fingerprint, normal_quantization, tokenizer_fingerprint
from tests.svc.json_values import json_values
from tests.svc.registry.model_folder import GPTQ, TEMPLATE, write_model

Change = dict[str, Any]


@pytest.fixture
def same(tmp_path: Path) -> Callable[[Change, Change], bool]:
    """Return a function that checks whether two model folders have the same fingerprint."""

    def same(one: Change, other: Change) -> bool:
        folders = [write_model(tmp_path / name, **change) for name, change in (("one", one), ("other", other))]
        prints = [compatibility_fingerprint(folder) for folder in folders]
        return prints[0] == prints[1]

    return same


Same = Callable[[Change, Change], bool]


def test_two_training_runs_of_one_model_share_a_fingerprint(same: Same) -> None:
    assert same({"seed": 1}, {"seed": 2})


def with_embedding(value: float, head: bool, **config: Any) -> Change:
    """Return a model whose embedding has the given value, with or without a separate output layer."""
    names = ["model.embed_tokens.weight", "layer.0", *(["lm_head.weight"] if head else [])]
    tensors = {name: np.zeros((4, 4), np.float32) for name in names}
    tensors["model.embed_tokens.weight"] += value
    return {"tensors": tensors, "config": config}


@pytest.mark.parametrize(
    ("head", "config"),
    [(False, {}), (True, {"tie_word_embeddings": True}), (True, {"text_config": {"tie_word_embeddings": True}})],
)
def test_fingerprint_includes_an_embedding_tied_to_the_output_layer(same: Same, head: bool, config: Change) -> None:
    assert not same(with_embedding(1, head, **config), with_embedding(2, head, **config))
    assert same(with_embedding(1, head, **config), with_embedding(1, head, **config))


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": False}])
def test_fingerprint_excludes_an_embedding_with_a_separate_output_layer(same: Same, config: Change) -> None:
    assert same(with_embedding(1, True, **config), with_embedding(2, True, **config))


def test_two_quantizations_of_one_model_share_a_fingerprint(same: Same) -> None:
    meta = {"quantizer": ["gptqmodel:7.7.0"], "offload_to_disk_path": "/tmp/z9", "damp_percent": 0.1}
    assert same({"quantization": GPTQ, "seed": 1}, {"quantization": GPTQ | {"meta": meta}, "seed": 2})


@pytest.mark.parametrize(
    "change",
    [
        {"quantization": GPTQ | {"bits": 8}},
        {"quantization": GPTQ | {"group_size": 32}},
        {"quantization": GPTQ | {"desc_act": True}},
        {"quantization": GPTQ | {"sym": False}},
        {"quantization": GPTQ | {"checkpoint_format": "gptq_v2"}},
        {"quantization": GPTQ | {"pack_dtype": "int64"}},
        {"quantization": GPTQ | {"lm_head": True}},
        {"quantization": GPTQ | {"quant_method": "awq"}},
        {"quantization": GPTQ | {"dynamic": {"-:down_proj": {}}}},
        {"quantization": None},
        {"config": {"hidden_size": 8}},
        {"config": {"architectures": ["QwenForCausalLM"]}},
        {"config": {"rope_theta": 1e6}},
        {"config": {"eos_token_id": 7}},
        {"tokenizer": {"model": {"type": "BPE", "vocab": {"a": 1, "b": 0}}}},
        {"tokenizer_config": {"eos_token": "a"}},
        {"tokenizer_config": {"chat_template": TEMPLATE + "!"}},
        {"tokenizer_config": {"chat_template": None}},
        {"generation": {"temperature": 0.5}},
        {"tensors": {"embed": np.zeros((2, 4), np.float32)}},
        {"tensors": {"embed": np.zeros((2, 4), np.float32), "layer.0": np.zeros((4, 5), np.float32)}},
        {"tensors": {"embed": np.zeros((2, 4), np.float32), "layer.0": np.zeros((4, 4), np.float16)}},
        {"tensors": {"embed": np.zeros((2, 4), np.float32), "layer.1": np.zeros((4, 4), np.float32)}},
    ],
    ids=str,
)
def test_fingerprint_changes_with_any_property_that_an_in_place_reload_cannot_change(
    same: Same, change: Change
) -> None:
    assert not same({"quantization": GPTQ}, {"quantization": GPTQ, **change})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"config": {"transformers_version": "5.19.0", "use_cache": False, "_name_or_path": "/x"}}),
        ({}, {"tokenizer": {"truncation": {"max_length": 5}, "padding": {"strategy": "BatchLongest"}}}),
        ({}, {"tokenizer_config": {"eos_token": {"content": "b", "lstrip": False}}}),
        ({}, {"tokenizer_config": {"model_max_length": 5}}),
        ({}, {"tokenizer_config": {"chat_template": TEMPLATE + "\n"}}),
        ({"generation": {}}, {"generation": {"transformers_version": "5.19.0"}}),
        ({}, {"generation": {}}),
        ({"quantization": GPTQ}, {"quantization": {"quant_method": "gptq", "bits": 4, "group_size": 64}}),
        ({"quantization": GPTQ}, {"quantization": GPTQ | {"dynamic": {}}}),
    ],
    ids=str,
)
def test_fingerprint_ignores_config_differences_that_do_not_affect_inference(
    same: Same, one: Change, other: Change
) -> None:
    assert same(one, other)


def test_fingerprint_does_not_depend_on_the_file_that_contains_the_chat_template(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one")
    other = write_model(tmp_path / "other", tokenizer_config={"chat_template": None})
    (other / "chat_template.jinja").write_text(TEMPLATE)
    assert compatibility_fingerprint(one) == compatibility_fingerprint(other)


def test_fingerprint_changes_with_template_arguments(tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "one"), write_model(tmp_path / "other")
    plain = compatibility_fingerprint(one)
    write_template_kwargs(other, {"enable_thinking": False})
    assert compatibility_fingerprint(other) != plain
    assert compatibility_fingerprint(other, {}) == plain
    assert compatibility_fingerprint(one, {"enable_thinking": False}) == compatibility_fingerprint(other)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_corrupt_template_arguments_file_is_named_in_the_error(tmp_path: Path, content: str) -> None:
    model = write_model(tmp_path / "one")
    (model / "chat_template_kwargs.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"chat_template_kwargs\.json"):
        compatibility_fingerprint(model)


def test_fingerprint_ignores_the_sharding_of_weights_into_files(tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "one"), write_model(tmp_path / "other")
    (other / "model.safetensors").rename(other / "model-00001-of-00001.safetensors")
    assert compatibility_fingerprint(one) == compatibility_fingerprint(other)


def test_fingerprint_uses_the_sentencepiece_model_if_there_is_no_tokenizer_json(tmp_path: Path) -> None:
    folders = [write_model(tmp_path / name) for name in ("one", "same", "other")]
    for folder, vocabulary in zip(folders, (b"a", b"a", b"b"), strict=True):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(vocabulary)
    one, same, other = map(compatibility_fingerprint, folders)
    assert one == same != other
    one, same, other = map(tokenizer_fingerprint, folders)
    assert one == same != other


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_model_file_raises_integrity_error(tmp_path: Path, file: str) -> None:
    folder = write_model(tmp_path)
    (folder / file).unlink()
    with pytest.raises(IntegrityError):
        compatibility_fingerprint(folder)


@pytest.mark.parametrize("content", ["", "[]", "5", "{", '{"quantization_config": "gptq"}', "[" * 100_000])
def test_corrupt_model_config_raises_integrity_error(tmp_path: Path, content: str) -> None:
    folder = write_model(tmp_path)
    (folder / "config.json").write_text(content)
    with pytest.raises(IntegrityError):
        compatibility_fingerprint(folder)


def test_normalized_quantization_config_is_none_without_quantization() -> None:
    assert normal_quantization(None) is None


def test_fingerprint_depends_on_the_format_of_compressed_tensors(tmp_path: Path) -> None:
    layouts = [
        {"quant_method": "compressed-tensors", "format": f"{kind}-quantized"} for kind in ("int", "float", "int")
    ]
    layouts[2]["version"] = "0.17.0"
    first, other, same = (
        compatibility_fingerprint(write_model(tmp_path / str(place), quantization=layout))
        for place, layout in enumerate(layouts)
    )
    assert first == same != other


configs = st.dictionaries(
    st.sampled_from([*GPTQ, "lm_head", "dynamic", "damp_percent", "true_sequential"]), json_values
)


@pytest.mark.slow
@given(configs)
def test_normalizing_a_quantization_config_is_idempotent(config: dict[str, Any]) -> None:
    normal = normal_quantization(config)
    assert json.dumps(normal_quantization(normal)) == json.dumps(normal)


@pytest.mark.slow
@given(configs, json_values)
def test_fingerprint_ignores_the_meta_key_of_the_quantization_config(config: dict[str, Any], meta: Any) -> None:
    assert json.dumps(normal_quantization(config | {"meta": meta})) == json.dumps(normal_quantization(config))
