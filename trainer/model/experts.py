"""Counts the experts of a mixture-of-experts model, and finds the parameters that contain them.

transformers stores a layer's experts in two parameters, each with one matrix per expert. These are not
linear layers, so code that handles only linear layers silently misses nine tenths of a model. This
module is independent of routing and adapters.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_COMMON = "num_experts"
_NAMES = (_COMMON, "num_local_experts", "n_routed_experts")


def count_experts(config: "PreTrainedConfig") -> int:
    """Return the number of experts per layer, or 0 if the model is not a mixture of experts."""
    name = _name(config)
    return int(getattr(config.get_text_config(), name)) if name else 0


def name_experts(config: "PreTrainedConfig") -> None:
    """Make all configs of this config's class provide the number of experts as `num_experts`, the name that TRL
    uses.

    transformers defines this alias for Mixtral, but not for Granite. Config files are still written with the
    original name.
    """
    text, name = config.get_text_config(), _name(config)
    if name and not hasattr(text, _COMMON):
        kind = type(text)
        known = kind.attribute_map
        kind.attribute_map = known | {_COMMON: known.get(name, name)}  # aliases of aliases are not resolved


def _name(config: "PreTrainedConfig") -> str | None:
    text = config.get_text_config()
    return next((name for name in _NAMES if getattr(text, name, None) is not None), None)


def fused_experts(model: "PreTrainedModel") -> list[str]:
    """Return the names of all expert parameters, which have the shape [experts, rows, columns].

    An example is `model.layers.0.mlp.experts.gate_up_proj`.
    """
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if "Experts" in type(module).__name__  # gates of recurrent models have three dimensions too
        for parameter, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3
    ]
