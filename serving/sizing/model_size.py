"""Determines a model's size from its config.json, or assumes typical dimensions for a size such as `8b`. No weights are
loaded.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svc.engine.model_facts import read_model_facts
from svc.errors import SettingsError

_BYTES = 2
_SIZE = re.compile(r"(\d{1,4}(?:\.\d{1,3})?)b", re.IGNORECASE)
_TYPICAL = (
    (0.5, 24, 14, 2, 64),
    (1, 16, 32, 8, 64),
    (3, 28, 24, 8, 128),
    (8, 32, 32, 8, 128),
    (14, 40, 40, 10, 128),
    (32, 64, 40, 8, 128),
    (70, 80, 64, 8, 128),
)
"""Dimensions assumed for a model of similar size. The columns are the parameters (in billions), layers, heads,
key-value heads and dimensions per head. The models are Qwen 2.5 0.5B and 32B, Llama 3 1B to 70B, and phi-4 (14B)."""
_TIED_BY_DEFAULT = ("gemma", "smollm3")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_USED_EXPERTS = ("num_experts_per_tok", "num_experts_per_token")


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Size of a model.

    Attributes:
        label: name for display.
        parameters: number of weights.
        expert_share: share of the weights that belong to experts.
        used_share: share of the experts that is used for each token.
        weight_bytes: size of all weights in memory.
        token_bytes: size of one token in the KV cache over all layers.
        heads, kv_heads: numbers of attention heads and key-value heads, which limit how many GPUs the model can be
            split across.
    """

    label: str
    parameters: float
    weight_bytes: float
    token_bytes: int
    heads: int
    kv_heads: int
    expert_share: float = 0.0
    used_share: float = 1.0

    @property
    def active(self) -> float:
        """Number of weights that are used for a token."""
        return self.parameters * (1 - self.expert_share * (1 - self.used_share))

    def read_bytes(self, tokens: int) -> float:
        """Return the number of bytes of weights that a step reads. A step with few tokens does not use all experts."""
        unused = (1 - self.used_share) ** tokens
        return self.weight_bytes * (1 - self.expert_share * unused)


def read_model_size(model: str, bits: int | None) -> ModelSize:
    """Return the size of a model.

    Args:
        model: a size in billions of parameters, such as `8b`, or the path of a config.json or of the folder that
            contains it.
        bits: bits per weight. If None, the size of the folder's weight files is used or, without such files, 16 bits.

    Raises:
        SettingsError: `model` is neither a size nor such a path, or the config lacks the layer widths.
    """
    path = Path(model)
    if path.name == "config.json":
        path = path.parent
    if (path / "config.json").is_file():
        return _of_folder(path, bits)
    if match := _SIZE.fullmatch(model):
        return _typical(float(match[1]), bits)
    raise SettingsError(
        f"unknown model {model!r}", expected="the number of parameters (for example 8b), or a folder with a config.json"
    )


def _typical(billions: float, bits: int | None) -> ModelSize:
    if billions <= 0:
        raise SettingsError(f"a model of {billions:g}b has no parameters", expected="a size such as 8b")
    _, layers, heads, kv_heads, width = min(_TYPICAL, key=lambda shape: abs(shape[0] / billions - 1))
    parameters = billions * 1e9
    token_bytes = 2 * layers * kv_heads * width * _BYTES
    return ModelSize(f"{billions:g}B", parameters, parameters * (bits or 16) / 8, token_bytes, heads, kv_heads)


def _of_folder(folder: Path, bits: int | None) -> ModelSize:
    try:
        facts = read_model_facts(folder)
        config: Any = json.loads((folder / "config.json").read_text("utf-8"))
        config = {**config, **(config.get("text_config") or {})}
        dense, experts, used = _parameters(config)
    except KeyError as error:
        raise SettingsError(
            f"{folder / 'config.json'} has no {error}", expected="a Llama-like language model", todo="use a size: 8b"
        ) from error
    except (AttributeError, OSError, TypeError, ValueError, ZeroDivisionError) as error:  # values of other types
        raise SettingsError(
            f"cannot use {folder / 'config.json'}: {error}",
            expected="the config of a Llama-like language model",
            todo="use a size: 8b",
        ) from error
    if dense <= 0 or experts < 0:
        raise SettingsError(
            f"{folder / 'config.json'} implies an impossible number of weights: {dense + experts}",
            expected="positive layer sizes",
        )
    if facts.token_bytes is None or facts.heads is None or facts.kv_heads is None:
        raise SettingsError(
            f"{folder / 'config.json'} lacks the number or size of the attention heads", todo="use a size such as 8b"
        )
    parameters = dense + experts
    from_files = facts.weights or parameters * _BYTES
    return ModelSize(
        label=folder.name,
        parameters=parameters,
        weight_bytes=parameters * bits / 8 if bits else from_files,
        token_bytes=facts.token_bytes,
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        expert_share=experts / parameters,
        used_share=used,
    )


def _parameters(config: dict[str, Any]) -> tuple[int, int, float]:
    """Return the numbers of weights outside and inside experts, and the share of the experts that is used for each
    token.

    Biases, norms, routers and shared experts are not counted. A feed-forward block is assumed to have three matrices,
    as in Llama.
    """
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    tied = config.get("tie_word_embeddings", str(config.get("model_type")).startswith(_TIED_BY_DEFAULT))
    embeddings = config["vocab_size"] * hidden * (1 if tied else 2)
    attention = layers * hidden * width * 2 * (heads + kv_heads)
    count = next((config[key] for key in _EXPERTS if config.get(key)), 0)
    if not count:
        return embeddings + attention + layers * 3 * hidden * config["intermediate_size"], 0, 1.0
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    used = next((config[key] for key in _USED_EXPERTS if config.get(key)), count)
    return embeddings + attention, layers * count * 3 * hidden * inner, used / count
