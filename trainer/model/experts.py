"""The experts of a mixture: how many there are, under which name a config has the number.

Knows nothing of routing, nor of adapters.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_COMMON = "num_experts"
_NAMES = (_COMMON, "num_local_experts", "n_routed_experts")


def count_experts(config: "PreTrainedConfig") -> int:
    """How many experts a layer of the model has; 0 in a model that is no mixture.

    From then on the config knows the number as `num_experts` too, as TRL asks each: transformers gave Mixtral's that
    second name, and not Granite's. What the config is written as stays as it is.
    """
    text = config.get_text_config()
    name = next((name for name in _NAMES if getattr(text, name, None) is not None), None)
    if name is None:
        return 0
    if not hasattr(text, _COMMON):
        kind = type(text)
        kind.attribute_map = kind.attribute_map | {_COMMON: name}
    return int(getattr(text, name))
