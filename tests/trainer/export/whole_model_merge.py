"""Merges a whole model in memory with transformers and PEFT. The tensor-by-tensor merge must be equal."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from trainer.export.merge import unused_modules
from trainer.export.verify_merge import adapted_tensors
from trainer.model.peft_config import load_adapter
from trainer.model.rounding import round_to_bfloat16


def merge_whole_model(base: Path, adapter: Path, out: Path) -> None:
    """Write the base plus adapter to `out`. Only the weight files equal those of a version."""
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    changed = set(adapted_tensors(model).values()) - unused_modules(adapter)
    merged = model.merge_and_unload(safe_merge=True)
    round_to_bfloat16(
        weight
        for name, weight in merged.named_parameters(remove_duplicate=False)
        if name in changed or name.removesuffix(".weight") in changed
    )
    merged.to(torch.bfloat16).save_pretrained(out)


def weight_bytes(folder: Path) -> dict[str, bytes]:
    """Return the contents of a folder's weight files and their index, keyed by file name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("model")}
