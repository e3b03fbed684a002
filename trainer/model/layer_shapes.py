"""Builds a model without weights from its config alone, and determines the shapes of its linear layers."""

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.model.config import load_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def linear_layers(model: "PreTrainedModel") -> dict[str, tuple[int, int]]:
    """Return the input and output sizes of a model's linear layers, keyed by name, excluding the output head
    and fused experts.
    """
    import torch

    head = model.get_output_embeddings()
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def empty_model(model: Path) -> "PreTrainedModel":
    """Build the model in a folder without loading its weights."""
    return without_weights(load_config(model))


def without_weights(config: "PreTrainedConfig") -> "PreTrainedModel":
    """Build the model that a config describes, without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return empty
