"""What AdaLoRA needs besides its layers.

Its ranks are shared out by a plan that must fit the run. After each step somebody must tell its allocator, which masks
the directions that matter least, and neither transformers' trainer nor TRL's does. Imports torch and PEFT.
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
"""Shares of all steps in which all ranks are kept at first, and those that were chosen at last."""


def rank_plan(steps: int) -> dict[str, int]:
    """When AdaLoRA shares out ranks in a run of so many steps, as PEFT's config names it.

    Ranks are shared out for good by what at least one earlier step has measured, so that it takes two steps. The plan
    of a run of one has its second step behind the end, and all ranks stay.
    """
    planned = max(steps, 2)
    warmup = round(_WARMUP * steps) if steps > 1 else 1
    final = min(round(_FINAL * steps), planned - 2)
    return {"total_step": planned, "tinit": warmup, "tfinal": final, "deltaT": max(1, steps // 100)}


class RankAllocation(TrainerCallback):
    """Tells AdaLoRA's allocator of each step, between the optimizer's step and the end of its gradients.

    Args:
        model: with an AdaLoRA adapter.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """`global_step` counts this step only afterwards."""
        step, config = state.global_step + 1, self._model.peft_config["default"]
        if step < config.total_step - config.tfinal:
            # In float16 the optimizer leaves out a step whose gradients are not finite: means of importance would stay
            # so.
            useful = not kwargs["optimizer"].step_was_skipped
        else:  # where every step before was left out, nothing says what to share ranks out by
            useful = bool(config.rank_pattern or self._model.base_model.rankallocator.exp_avg_ipt)
        if useful:
            self._model.base_model.update_and_allocate(step)

    def save(self, folder: Path) -> None:
        """Writes the allocator's running means and its masks beside a checkpoint's weights."""
        allocator, config = self._model.base_model.rankallocator, self._model.peft_config["default"]
        kinds = {"ipt": allocator.ipt, "mean": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc}
        tensors = {f"{kind}/{name}": value for kind, values in kinds.items() for name, value in values.items()}
        save_file(tensors, folder / _ALLOCATOR_FILE, {"rank_pattern": json.dumps(config.rank_pattern)})

    def restore(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        allocator, config = self._model.base_model.rankallocator, self._model.peft_config["default"]
        kinds = {"ipt": allocator.ipt, "mean": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc}
        device = next(self._model.parameters()).device
        for key, value in load_file(folder / _ALLOCATOR_FILE, device=str(device)).items():
            kind, _, name = key.partition("/")
            kinds[kind][name] = value
        with safe_open(folder / _ALLOCATOR_FILE, framework="pt") as file:
            config.rank_pattern = json.loads(file.metadata()["rank_pattern"])
