"""Determines the size of a base model from config.json alone, by building it without weights and counting
its layers.

This gives exact counts for every architecture that transformers knows, including mixtures of experts.
Any other architecture is assumed to be a Llama of the same widths with full attention; `ModelShape.notes`
states what remains unknown.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svc.errors import BaseModelError
from trainer.base_model.checks import read_json
from trainer.model.attention import attention_implementation
from trainer.model.experts import fused_experts
from trainer.model.layer_shapes import linear_layers, without_weights
from trainer.model.target_modules import target_layers
from trainer.recipe.targets import TargetChoice, Targets

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_USED_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ModelShape:
    """Layers and widths of a model.

    Attributes:
        architecture: name of the architecture in the config.
        parameters: number of weights; weights shared by two layers are counted once.
        hidden: width of the hidden states between layers.
        inner: inner width of the feed-forward block for one token, summed over all experts that process the
            token.
        layers: number of layers.
        heads, kv_heads, head_width: number of query heads, number of key and value heads, and width of a head.
        vocabulary: number of tokens.
        linear: input and output sizes of each linear layer except the output head, keyed by name.
        targets: names of the linear layers that an adapter changes.
        experts: shapes [experts, rows, columns] of the parameters that contain all experts of a layer.
        experts_share: share of a layer's experts that process each token.
        adapts_experts: whether an adapter also changes the experts.
        untied: whether the output head has its own weights instead of sharing the embedding's weights.
        context: the model's maximum number of tokens, or None if the config does not state it.
        shares_keys: whether every layer attends to all earlier tokens, so that a common prefix can be
            computed once.
        stores_scores: whether attention stores the scores of all pairs of tokens, because the config caps them.
            The estimate does not count them.
        notes: sentences that state what is unknown.
    """

    architecture: str
    parameters: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    linear: Mapping[str, tuple[int, int]]
    targets: tuple[str, ...]
    experts: tuple[tuple[int, int, int], ...] = ()
    experts_share: float = 1.0
    adapts_experts: bool = False
    untied: bool = False
    context: int | None = None
    shares_keys: bool = True
    stores_scores: bool = False
    notes: tuple[str, ...] = ()

    @property
    def head(self) -> int:
        """Number of weights in the output head."""
        return self.hidden * self.vocabulary

    @cached_property
    def linear_weights(self) -> int:
        """Number of weights that NF4 quantizes, which are the weights of all linear layers except the output head."""
        return sum(inputs * outputs for inputs, outputs in self.linear.values())

    @cached_property
    def expert_weights(self) -> int:
        """Number of weights in all experts."""
        return sum(prod(shape) for shape in self.experts)

    @property
    def used_weights(self) -> float:
        """Number of weights used to process one token, excluding the output head."""
        return self.linear_weights + self.expert_weights * self.experts_share

    @cached_property
    def largest_layer(self) -> int:
        """Number of weights in the largest linear layer."""
        return max((inputs * outputs for inputs, outputs in self.linear.values()), default=0)

    @property
    def queries(self) -> int:
        """Total width of a layer's queries."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Total width of a layer's keys, which equals the total width of its values."""
        return self.kv_heads * self.head_width

    @property
    def target_shapes(self) -> list[tuple[int, int]]:
        """Input and output sizes of the linear layers that an adapter changes."""
        return [self.linear[name] for name in self.targets]


def read_model_shape(folder: Path, chosen: TargetChoice = Targets.ALL_LINEAR) -> ModelShape:
    """Return the shape of the model that a folder's config.json describes, without reading any weights.

    Args:
        chosen: the layers that an adapter changes.

    Raises:
        BaseModelError: the config is missing or lacks the model's widths.
        RecipeError: the model lacks the chosen layers.
    """
    config, notes = _read_config(folder)
    try:
        model = without_weights(config)
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError, ImportError) as error:
        raise BaseModelError(
            f"transformers cannot build a {config.model_type} model from {folder / 'config.json'}: {error}",
            expected="a language model that transformers supports",
            todo="choose another base, or update transformers",
        ) from error
    return count_model(model, chosen, notes)


def _read_config(folder: Path) -> tuple["PreTrainedConfig", tuple[str, ...]]:
    """Return the model's config. If transformers does not know the architecture, also return notes on what was
    assumed.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    path = folder / "config.json"
    content = read_json(path)
    kind = content.get("model_type")
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoConfig.for_model(**content).get_text_config(), ()
    return _as_llama(path, content)


def _as_llama(path: Path, content: dict[str, Any]) -> tuple["PreTrainedConfig", tuple[str, ...]]:
    """Return the config of a Llama with the same widths as the model, and notes on what this approximation omits.

    The Llama is at least as large as the part of the model to which these widths apply.
    """
    from transformers import LlamaConfig

    text = content.get("text_config")
    widths = content | text if isinstance(text, dict) else content
    if missing := [name for name in _NEEDED if not isinstance(widths.get(name), int)]:
        raise BaseModelError(
            f"{path} has model_type {content.get('model_type')!r}, which transformers does not support, and is missing "
            f"{', '.join(missing)}",
            expected="an architecture that transformers supports",
            todo="choose another base, or update transformers",
        )
    inner = widths.get("intermediate_size") or 4 * widths["hidden_size"]
    named = {name: widths[name] for name in (*_NEEDED, "head_dim") if isinstance(widths.get(name), int)}
    config = LlamaConfig(**named, intermediate_size=inner, tie_word_embeddings=False)
    note = (
        f"transformers does not support model_type {content.get('model_type')!r}, so it is counted as a Llama of the "
        "same widths with keys and values for every head; experts and other components are not counted"
    )
    return config, (note,)


def count_model(model: "PreTrainedModel", chosen: TargetChoice, notes: tuple[str, ...] = ()) -> ModelShape:
    """Return the shape of a model, which may have been built without weights.

    Args:
        chosen: the layers that an adapter changes.
        notes: assumptions to include in the shape's notes.
    """
    from trainer.training.loss import keeps_all_keys

    model.tie_weights()
    config, linear, weights = model.config.get_text_config(), linear_layers(model), dict(model.named_parameters())
    experts = tuple((shape[0], shape[1], shape[2]) for name in fused_experts(model) if (shape := weights[name].shape))
    total = max((shape[0] for shape in experts), default=0)
    used = next((value for name in _USED_EXPERTS if (value := getattr(config, name, None))), total)
    if total and used == total:
        notes += ("the config does not say how many experts process a token, so all are counted",)
    heads = config.num_attention_heads
    return ModelShape(
        architecture=config.model_type,
        parameters=sum(weight.numel() for weight in weights.values()),
        hidden=config.hidden_size,
        inner=_inner(config, linear, experts, used),
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        linear=linear,
        targets=tuple(target_layers(model, chosen)),
        experts=experts,
        experts_share=used / total if total else 1.0,
        adapts_experts=bool(experts) and chosen is Targets.ALL_LINEAR,
        untied=not config.tie_word_embeddings,
        context=getattr(config, "max_position_embeddings", None),
        shares_keys=keeps_all_keys(config),
        stores_scores=attention_implementation(config) == "eager",
        notes=notes,
    )


def _inner(
    config: "PreTrainedConfig",
    linear: Mapping[str, tuple[int, int]],
    experts: tuple[tuple[int, int, int], ...],
    used: int,
) -> int:
    """Return the inner width of a feed-forward block. It is derived from the block's layers if the config does
    not state it.
    """
    own = getattr(config, "intermediate_size", None)
    if experts:
        # Gate and up are one parameter, [experts, 2 x inner, hidden] or with the last two swapped.
        widest = max(max(shape[1:]) for shape in experts)
        return int((getattr(config, "moe_intermediate_size", None) or own or widest) * used)
    return int(own or max((size for shape in linear.values() for size in shape), default=4 * config.hidden_size))
