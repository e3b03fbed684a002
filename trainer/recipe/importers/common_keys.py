"""Imports the config values that Axolotl and LLaMA-Factory share, because both pass them to transformers and PEFT."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from svc.dataset.readers.source import HUB_PREFIX
from svc.dataset.schema.objective import Objective
from trainer.recipe.adapter import Adapter, AdapterType, Method, Quantization, TokenLayer
from trainer.recipe.importers.draft import Draft
from trainer.recipe.rope import RopeType
from trainer.recipe.targets import Targets
from trainer.recipe.train import Optimizer, Schedule

_OPTIMIZERS = {
    Optimizer.ADAMW: ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"),
    Optimizer.ADAMW_8BIT: ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"),
    Optimizer.PAGED_ADAMW: ("paged_adamw", "paged_adamw_32bit"),
    Optimizer.PAGED_ADAMW_8BIT: ("paged_adamw_8bit",),
}
_SCHEDULES = {
    "linear": Schedule.LINEAR,
    "cosine": Schedule.COSINE,
    "constant": Schedule.CONSTANT,
    "constant_with_warmup": Schedule.CONSTANT,
}
_PRESETS = {
    frozenset({"q_proj", "v_proj"}): Targets.ATTENTION_MIN,
    frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}): Targets.ATTENTION,
    frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}): Targets.ALL_LINEAR,
}
PER_GPU = "the imported value is per GPU, but here it is the total for all GPUs: multiply it by the number of GPUs"


def import_optimizer(draft: Draft, key: str, default: str) -> None:
    """Import the optimizer setting. Axolotl and LLaMA-Factory use the optimizer names of transformers."""
    name = draft.take(key, default)
    if optimizer := next((ours for ours, names in _OPTIMIZERS.items() if name in names), None):
        draft.values["train.optimizer"] = optimizer.value
    else:
        draft.leave_out(key, f"{name} is not available; adamw is used")


def import_schedule(draft: Draft, key: str, default: str) -> None:
    """Import the learning rate schedule."""
    name = draft.take(key, default)
    if schedule := _SCHEDULES.get(name):
        draft.values["train.schedule"] = schedule.value
    else:
        draft.leave_out(key, f"{name} is not available; set train.schedule to one of {', '.join(Schedule)}")


def import_warmup(draft: Draft, default: float, *, zero_steps: bool = False) -> None:
    """Set the warmup ratio from the other tool's `warmup_ratio` or `warmup_steps`.

    Args:
        default: warmup ratio if the config sets neither key.
        zero_steps: whether `warmup_steps: 0` turns the warmup off. If not, it is ignored.
    """
    ratio, steps, total = draft.take("warmup_ratio"), draft.take("warmup_steps"), draft.values.get("train.steps")
    if steps is not None and steps < 1 and (steps or zero_steps):
        ratio, steps = steps, None
    if steps and total:
        ratio = round(steps / total, 4)
    elif steps:
        draft.leave_out("warmup_steps", f"set train.warmup_ratio to {steps} divided by the number of steps")
        return
    draft.values["train.warmup_ratio"] = default if ratio is None else ratio


def import_method(draft: Draft, *, adapter: bool, dora: bool, four_bit: bool) -> None:
    """Set the training method."""
    if not adapter:
        draft.values["method"] = Method.FULL.value
    elif dora:
        draft.values["method"] = Method.DORA.value
        if four_bit:
            draft.values |= {"quantization": Quantization.NF4.value, "adapter.type": AdapterType.DORA.value}
    else:
        draft.values["method"] = (Method.QLORA if four_bit else Method.LORA).value


def import_targets(draft: Draft, key: str, names: Any) -> None:
    """Import `adapter.targets` from a list of the names of the layers that get an adapter."""
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        preset = _PRESETS.get(frozenset(names))
        draft.values["adapter.targets"] = preset.value if preset else sorted(set(names))
    else:
        draft.leave_out(key, "a pattern for layer names; list the last part of each layer name in adapter.targets")


def import_start(draft: Draft, key: str, start: str) -> None:
    """Import the adapter's initialization as `adapter.init`.

    Call this after setting `method` and `adapter.rslora`.

    Args:
        start: PEFT's name for the initialization.
    """
    plain, rooted = draft.values["method"] == Method.LORA, draft.values.get("adapter.rslora")
    try:
        adapter = Adapter(init=start)
    except ValidationError:
        draft.leave_out(key, f"{start} is not available; see adapter.init in docs/recipe.md for the available values")
        return
    if plain and not (rooted and adapter.starts_from_base):
        draft.values["adapter.init"] = start
    else:
        draft.leave_out(key, f"{start} is available only for `method: lora` without rslora")


def import_rope(draft: Draft, key: str, kind: str, factor: float | None) -> None:
    """Import RoPE scaling."""
    if kind in tuple(RopeType) and factor and factor > 1:
        draft.values |= {"rope_scaling.type": kind, "rope_scaling.factor": float(factor)}
    else:
        draft.leave_out(
            key, f"set rope_scaling with one of {', '.join(RopeType)} and a factor above 1, instead of {kind}"
        )


def import_new_tokens(draft: Draft, key: str, *, special: bool = False) -> None:
    """Import tokens to add to the tokenizer: a list, or names separated by commas. Call this after setting `method`."""
    given = draft.take(key) or ()
    tokens = [str(token).strip() for token in (given.split(",") if isinstance(given, str) else given)]
    if tokens:
        draft.values["new_tokens"] = [*draft.values.get("new_tokens", ()), *tokens]
        if special:
            draft.changed(key, "the new tokens are not special tokens here, so they are not removed from answers")


def import_modules_to_save(draft: Draft, key: str) -> None:
    """Import names of layers to train in full as `adapter.modules_to_save`. Call this after setting `method`."""
    names = draft.take(key) or ()
    listed = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    if not listed or draft.values["method"] == Method.FULL:
        return
    if set(listed) <= set(TokenLayer):
        draft.values["adapter.modules_to_save"] = listed
    else:
        draft.leave_out(key, f"besides the adapted layers, only {' and '.join(TokenLayer)} can be trained")


def import_dropout(draft: Draft) -> None:
    """Import the adapter's dropout, or leave it out if the recipe has a preference objective, since these objectives do
    not support dropout. Call this after the method and the objective have been imported.
    """
    dropout = draft.take("lora_dropout")
    if not dropout or draft.values["method"] == Method.FULL:
        return
    if not Objective(draft.values.get("objective", Objective.SFT)).is_preference:
        draft.values["adapter.dropout"] = dropout
    else:
        draft.leave_out("lora_dropout", "dropout would randomly change the likelihoods that are compared")


def import_run(draft: Draft) -> None:
    """Import the general training settings that have the same name and meaning in Axolotl and LLaMA-Factory."""
    draft.copy("max_steps", "train.steps")
    if draft.values.get("train.steps", 1) < 1:  # transformers' default is -1
        del draft.values["train.steps"]
    draft.copy("weight_decay", "train.weight_decay")
    draft.copy("max_grad_norm", "train.max_grad_norm")
    draft.copy("seed", "train.seed")
    for key, name in (("save_steps", "checkpoints.every_steps"), ("eval_steps", "stopping.every_steps")):
        steps = draft.take(key)
        if isinstance(steps, int) and steps >= 1:
            draft.values[name] = steps
        elif steps:
            draft.leave_out(key, f"set {name} to a number of steps")
    draft.copy("save_total_limit", "checkpoints.keep")
    if draft.take("load_best_model_at_end"):
        draft.values["stopping.keep_best"] = True
    checkpointing = draft.take("gradient_checkpointing")
    if checkpointing is not None:
        draft.values["train.gradient_checkpointing"] = bool(checkpointing)
        if isinstance(checkpointing, str):
            draft.changed(
                "gradient_checkpointing", f"{checkpointing!r} was imported as true; activations are not offloaded"
            )
    draft.copy("neftune_noise_alpha", "train.neftune_alpha")
    ratio = draft.take("loraplus_lr_ratio")
    if ratio is not None and draft.values["method"] != Method.FULL:
        draft.values["train.lora_plus_ratio"] = ratio


def source(path: str, folder: Path, files: tuple[str, ...] = (), revision: str | None = None) -> list[str]:
    """Return the recipe sources that correspond to a dataset.

    Args:
        path: an existing file or folder, or else the id of a dataset on the Hub.
        folder: folder of the new recipe, to which paths are relative.
        files: files within the dataset; by default, all files.
    """
    local = Path(path).expanduser()
    if local.exists() or path.startswith((".", "/", "~")) or local.suffix:
        return [beside(local / file, folder) for file in files] or [beside(local, folder)]
    hub = HUB_PREFIX + path + (f"@{revision}" if revision else "")
    return [f"{hub}/{file}" for file in files] or [hub]


def beside(path: Path, folder: Path) -> str:
    """Return a path relative to a recipe's folder, or the absolute path if it is outside that folder."""
    absolute = path.absolute()
    return f"./{absolute.relative_to(folder)}" if absolute.is_relative_to(folder) else str(absolute)
