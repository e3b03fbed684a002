"""Computes AdaLoRA's rank schedule, and saves and restores its rank allocator.

AdaLoRA distributes ranks on a schedule that depends on the number of steps. Its allocator masks the
least important directions and must be called after each step. Because neither transformers' nor TRL's
trainer calls it, this module does. Imports torch and PEFT.
"""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState

_ALLOCATOR_FILE = "rank_allocator.safetensors"
_WARMUP, _FINAL = 0.1, 0.3
"""Shares of a run's steps at its start, where AdaLoRA keeps all ranks, and at its end, where the chosen ranks no longer
change."""


def rank_plan(steps: int) -> dict[str, int]:
    """Return the steps of a run at which AdaLoRA distributes ranks, keyed by their names in PEFT's config.

    The final distribution relies on measurements from at least one earlier step, so the schedule has at least two
    steps. A run of one step therefore never reaches the final distribution, and keeps all ranks.
    """
    planned = max(steps, 2)
    warmup = round(_WARMUP * steps) if steps > 1 else 1
    final = min(round(_FINAL * steps), planned - 2)
    return {"total_step": planned, "tinit": warmup, "tfinal": final, "deltaT": max(1, steps // 100)}


class RankAllocation(TrainerCallback):
    """Callback that updates AdaLoRA's rank allocator after each optimizer step, before gradients are cleared.

    Args:
        model: model with an AdaLoRA adapter.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update the rank allocator after an optimizer step, which `global_step` does not count yet."""
        step, config = state.global_step + 1, self._model.peft_config["default"]
        if step < config.total_step - config.tfinal:
            # In float16 the optimizer skips a step whose gradients are not finite, which would spoil the means.
            useful = not kwargs["optimizer"].step_was_skipped
        else:  # if all earlier steps were skipped, there are no measurements for distributing ranks
            useful = bool(config.rank_pattern or self._model.base_model.rankallocator.exp_avg_ipt)
        if useful:
            self._model.base_model.update_and_allocate(step)

    def save(self, folder: Path) -> None:
        """Write the rank allocator's running means and masks to a checkpoint folder."""
        allocator, config = self._model.base_model.rankallocator, self._model.peft_config["default"]
        kinds = {"ipt": allocator.ipt, "mean": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc}
        tensors = {f"{kind}/{name}": value for kind, values in kinds.items() for name, value in values.items()}
        save_file(tensors, folder / _ALLOCATOR_FILE, {"rank_pattern": json.dumps(config.rank_pattern)})

    def restore(self, folder: Path) -> None:
        """Load the rank allocator's state that `save` wrote to a checkpoint folder."""
        allocator, config = self._model.base_model.rankallocator, self._model.peft_config["default"]
        kinds = {"ipt": allocator.ipt, "mean": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc}
        device = next(self._model.parameters()).device
        for key, value in load_file(folder / _ALLOCATOR_FILE, device=str(device)).items():
            kind, _, name = key.partition("/")
            kinds[kind][name] = value
        with safe_open(folder / _ALLOCATOR_FILE, framework="pt") as file:
            config.rank_pattern = json.loads(file.metadata()["rank_pattern"])
