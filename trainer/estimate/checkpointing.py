"""Decides whether to use gradient checkpointing on a GPU: it is off if training fits in the free memory without it.

Checkpointing computes each layer twice, so a step takes about a third longer. It affects the result only through
rounding, so a run may resume with a different setting. On a CPU it is off; see docs/training-speed.md.
"""

from dataclasses import dataclass

from trainer.estimate.estimate import Estimate, estimate_recipe, memory_on
from trainer.recipe.train import Sharding

SPARE = 1.4
"""Checkpointing is off only if the free memory exceeds the estimate without checkpointing by this factor. On a
CPU, estimates differed from the measured memory by at most a fifth. No estimate was compared with a measurement on a
GPU."""
_KEY = "train.gradient_checkpointing"


@dataclass(frozen=True, slots=True)
class Checkpointing:
    """The decision whether to use gradient checkpointing, and the reason for it."""

    enabled: bool
    reason: str


def choose_checkpointing(estimate: Estimate) -> Checkpointing:
    """Decide whether a run on this machine uses gradient checkpointing. `train.gradient_checkpointing` in the recipe
    takes precedence.
    """
    recipe, device = estimate.recipe, estimate.here.device
    asked = recipe.train.gradient_checkpointing
    if asked is not None:
        return Checkpointing(asked, _KEY)
    if device.cpu:
        return Checkpointing(False, "on a CPU, speed matters more than memory")
    if estimate.shape.stores_scores:
        return Checkpointing(True, "without checkpointing, the attention scores of all layers would be stored")
    stored = recipe.changed({_KEY: False, **_sharding(estimate)})
    need = SPARE * memory_on(stored, estimate.shape, estimate.workload.largest, device)
    return Checkpointing(
        need > device.memory,
        f"without checkpointing, training needs up to {need / 1e9:.1f} GB; {device.memory / 1e9:.1f} GB are free",
    )


def with_checkpointing(estimate: Estimate, enabled: bool, served_length: int) -> Estimate:
    """Return the estimate for this machine with gradient checkpointing on or off.

    Args:
        served_length: maximum sequence length in the engine, in tokens.
    """
    recipe, device = estimate.recipe.changed({_KEY: enabled, **_sharding(estimate)}), estimate.here.device
    return estimate_recipe(recipe, estimate.shape, estimate.workload, [device], served_length)


def _sharding(estimate: Estimate) -> dict[str, str]:
    """Return a recipe change that keeps the given estimate's choice of whether to shard the weights.

    Training without checkpointing needs more memory, so turning checkpointing off could otherwise turn sharding on.
    """
    here = estimate.here
    if here.device.count == 1 or here.undivided:
        return {}
    return {"train.sharding": (Sharding.ALWAYS if here.sharded else Sharding.NEVER).value}
