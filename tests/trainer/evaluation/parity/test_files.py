"""Tests that the config of merged weights is the base's own, compared by meaning rather than spelling."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from svc.errors import BaseModelError
from trainer.base_model.content import copy_shipped_files
from trainer.evaluation.parity.files import other_config, other_files

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 259,
}
"""Config of Llama 3.2 as published, with the keys of transformers 4 but with small sizes."""
QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_window_layers": 1,
    "rope_theta": 1000000.0,
    "sliding_window": 64,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 259,
}


def write_folder(folder: Path, config: dict[str, Any], **text: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, **text), "utf-8")
    return folder


@pytest.mark.parametrize("end", ["", "\n", "\r\n"], ids=["no final newline", "newline", "CRLF"])
def test_config_of_a_bfloat16_base_is_copied_byte_for_byte(tmp_path: Path, end: str) -> None:
    base, merged = write_folder(tmp_path / "base", LLAMA), tmp_path / "merged"
    content = json.dumps(LLAMA, indent=1).replace("\n", end or "\n") + end
    (base / "config.json").write_bytes(content.encode())
    merged.mkdir()
    copy_shipped_files(base, merged)
    assert (merged / "config.json").read_bytes() == content.encode()


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_merged_model_config_differs_from_the_config_of_a_float16_base_only_in_dtype(tmp_path: Path, key: str) -> None:
    own = {name: value for name, value in LLAMA.items() if name != "torch_dtype"} | {key: "float16"}
    base, merged = write_folder(tmp_path / "base", own), tmp_path / "merged"
    merged.mkdir()
    copy_shipped_files(base, merged)
    written = json.loads((merged / "config.json").read_text("utf-8"))
    assert written == own | {key: "bfloat16"}
    assert list(written) == list(own)
    assert other_config(base, merged) == []


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen2"])
def test_equivalent_config_saved_by_transformers_passes_the_parity_check(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    base = write_folder(tmp_path / "base", config)
    AutoConfig.from_pretrained(base).save_pretrained(tmp_path / "saved")
    spelled = json.loads((tmp_path / "saved" / "config.json").read_text("utf-8"))
    assert "rope_theta" not in spelled
    assert other_config(base, tmp_path / "saved") == []


PLANTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "frequencies": (LLAMA, {"rope_theta": 10000.0}),
    "scaling factor": (LLAMA, {"rope_scaling": LLAMA["rope_scaling"] | {"factor": 8.0}}),
    "no scaling": (LLAMA, {"rope_scaling": None}),
    "context before scaling": (
        LLAMA,
        {"rope_scaling": LLAMA["rope_scaling"] | {"original_max_position_embeddings": 4096}},
    ),
    "heads": (LLAMA, {"num_attention_heads": 8}),
    "key-value heads": (LLAMA, {"num_key_value_heads": 4}),
    "head width": (LLAMA, {"head_dim": 32}),
    "end tokens": (LLAMA, {"eos_token_id": 2}),
    "start token": (LLAMA, {"bos_token_id": 3}),
    "tied embeddings": (LLAMA, {"tie_word_embeddings": False}),
    "norm": (LLAMA, {"rms_norm_eps": 1e-6}),
    "activation": (LLAMA, {"hidden_act": "gelu"}),
    "layers": (LLAMA, {"num_hidden_layers": 1}),
    "context": (LLAMA, {"max_position_embeddings": 8192}),
    "architecture": (LLAMA, {"model_type": "mistral"}),
    "type of the weights": (LLAMA, {"torch_dtype": "float16"}),
    "widths that do not divide": (LLAMA, {"hidden_size": 66, "num_attention_heads": 5}),
    "sliding window": (QWEN, {"use_sliding_window": True}),
    "scaling where there was none": (QWEN, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    "head width where none was said": (QWEN, {"head_dim": 32}),
}


@pytest.mark.parametrize(("config", "changed"), PLANTED.values(), ids=PLANTED)
def test_config_difference_that_affects_answers_fails_the_parity_check(
    tmp_path: Path, config: dict[str, Any], changed: dict[str, Any]
) -> None:
    base, merged = write_folder(tmp_path / "base", config), write_folder(tmp_path / "merged", config | changed)
    assert other_config(base, merged)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "tokenizer.model"])
def test_single_changed_byte_in_a_shipped_file_fails_the_parity_check(tmp_path: Path, name: str) -> None:
    base, merged = write_folder(tmp_path / "base", LLAMA), write_folder(tmp_path / "merged", LLAMA)
    (base / name).write_bytes(b'{"eos_token_id": [2, 5]}\r\n')
    (merged / name).write_bytes(b'{"eos_token_id": [2, 5]}\n')
    assert other_files(base, merged) == [name]


def test_base_config_unreadable_by_transformers_raises_error(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", LLAMA | {"vocab_size": "many"})
    with pytest.raises(BaseModelError, match="vocab_size"):
        other_config(base, base)
