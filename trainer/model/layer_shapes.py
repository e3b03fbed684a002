"""The shapes of a model's linear layers and the names of its experts, from its config alone."""

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.model.config import load_config
from trainer.model.experts import fused_experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def layer_widths(model: Path) -> dict[str, int]:
    """Return the input width of every linear layer except the output head, by name."""
    return {name: inputs for name, (inputs, _) in layer_shapes(model).items()}


def expert_names(model: Path) -> list[str]:
    """Return the names of the parameters that contain the experts of a mixture; empty if the model is not a mixture."""
    return fused_experts(empty_model(model))


def layer_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Return the numbers of inputs and outputs of every linear layer except the output head, by name."""
    return linear_layers(empty_model(model))


def linear_layers(model: "PreTrainedModel") -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of a model's linear layers, except the output head and the experts of a mixture."""
    import torch

    head = model.get_output_embeddings()
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def empty_model(model: Path) -> "PreTrainedModel":
    """Return the model of a folder, without weights."""
    return without_weights(load_config(model))


def without_weights(config: "PreTrainedConfig") -> "PreTrainedModel":
    """Return the model of a config, without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return empty
