"""The shapes of a model's linear layers, from its config alone."""

from pathlib import Path


def layer_widths(model: Path) -> dict[str, int]:
    """Input width of every linear layer but the output head, by name."""
    return {name: inputs for name, (inputs, _) in layer_shapes(model).items()}


def layer_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every linear layer but the output head, by name."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head = empty.get_output_embeddings()
    return {
        name: (module.in_features, module.out_features)
        for name, module in empty.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
