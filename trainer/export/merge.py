"""Adds an adapter to its base model, and has verified that this happened."""

import json
from pathlib import Path

from svc.terminal import waiting
from trainer.base_model.content import copy_shipped_files
from trainer.export.verify_merge import MergeSummary, adapted_tensors, compare_weights, load_weights, merge_failed
from trainer.library_output import library_output_to_log

_PEFT_PREFIX = "base_model.model."  # before every name in an adapter's file


def merge_adapter(base: Path, adapter: Path, out: Path) -> MergeSummary:
    """Writes base plus adapter as bf16 safetensors, with the base's tokenizer and templates as they are, to `out`.

    The sum is taken in float32 and rounded so that an adapter's small changes are not lost (`trainer.model.rounding`).

    Args:
        base: folder of the model that the adapter was trained on.
        adapter: folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        TrainingError: a module that the adapter targets has the base's weights still, or another tensor differs.
    """
    with waiting("Merging the adapter into the base model"), library_output_to_log():
        changed = _merge(base, adapter, out)
    copy_shipped_files(base, out)
    with waiting("Comparing the merged weights with the base's"):
        return compare_weights(load_weights(base), load_weights(out), changed)


def unused_modules(adapter: Path) -> set[str]:
    """Modules to which AdaLoRA gave no rank in the end: they keep the base's weights, as they must."""
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    unused = {
        name for name, kept in (config.get("rank_pattern") or {}).items() if isinstance(kept, list) and not any(kept)
    }
    return {name.partition(".lora_")[0].removeprefix(_PEFT_PREFIX) for name in unused}


def _merge(base: Path, adapter: Path, out: Path) -> set[str]:
    """Merges, writes, and returns the modules and parameters that must have changed."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    from trainer.model.peft_config import load_adapter
    from trainer.model.rounding import round_to_bfloat16

    model = load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    tensors = adapted_tensors(model)
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        named = {name.partition(".lora_")[0] for name in file.keys() if ".lora_" in name}  # noqa: SIM118
    layers = {name.removeprefix(_PEFT_PREFIX) for name in named} | set(tensors)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise merge_failed(f"{adapter} cannot be merged: {error}") from error
    changed = {tensors.get(layer, layer) for layer in layers} - unused_modules(adapter)
    round_to_bfloat16(
        weight
        for name, weight in merged.named_parameters(remove_duplicate=False)
        if name in changed or name.removesuffix(".weight") in changed
    )
    merged.to(torch.bfloat16).save_pretrained(out)
    return changed
