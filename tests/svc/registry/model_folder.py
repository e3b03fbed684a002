"""A minimal model folder with everything that a fingerprint reads, and weights of a few bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 64,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "meta": {"quantizer": ["gptqmodel:7.6.0"], "offload_to_disk_path": "/tmp/a1b2"},
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4,
    "num_attention_heads": 2,
    "torch_dtype": "bfloat16",
}
TOKENIZER: dict[str, Any] = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "truncation": None}
TOKENIZER_CONFIG: dict[str, Any] = {"eos_token": "b", "chat_template": TEMPLATE}


def write_model(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write a model folder. Arguments are merged into the defaults, except for `tensors`, which replaces them."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = CONFIG | (config or {}) | ({"quantization_config": quantization} if quantization else {})
    files = {
        "config.json": whole,
        "tokenizer.json": TOKENIZER | (tokenizer or {}),
        "tokenizer_config.json": TOKENIZER_CONFIG | (tokenizer_config or {}),
    }
    if generation is not None:
        files["generation_config.json"] = generation
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    random = np.random.default_rng(seed)
    default = {"embed": random.random((2, 4), np.float32), "layer.0": random.random((4, 4), np.float32)}
    save_file(tensors or default, folder / "model.safetensors")
    return folder
