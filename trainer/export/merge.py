"""Adds an adapter to its base model and proves that this happened.

A merge that silently does nothing gives a version that answers like the base; a merge that touches more than the
adapter names gives one that nobody trained. Both are found here, by comparing every tensor of what was written with
the base's. What full fine-tuning wrote is compared in the same way. Knows nothing of quality: whether the change is a
good one is for the evaluation to say.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svc.errors import TrainingError
from svc.terminal import waiting
from trainer.export.gptq import layer_widths
from trainer.library_output import library_output_to_log

if TYPE_CHECKING:
    import torch

_PEFT_PREFIX = "base_model.model."  # before every name in an adapter's file


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """What training changed.

    Attributes:
        modules: linear layers that changed.
        smallest_changed_share: share of weights that differ, in the layer where it is smallest. A learnt change that
            is finer than bf16 is rounded away, so that it is below 1.
        largest_change: largest difference of one weight.
    """

    modules: int
    smallest_changed_share: float
    largest_change: float


def merge_adapter(base: Path, adapter: Path, out: Path) -> MergeSummary:
    """Writes base plus adapter as bf16 safetensors, with tokenizer, chat template and generation config, to `out`.

    The sum is taken in float32: in bf16 an adapter's small changes would be rounded before they are added.

    Args:
        base: folder of the model that the adapter was trained on.
        adapter: folder with adapter_config.json, adapter_model.safetensors and the tokenizer to ship.

    Raises:
        TrainingError: a module that the adapter targets has the base's weights still, or another tensor differs.
    """
    from transformers import AutoTokenizer

    with waiting("Merging the adapter into the base model"), library_output_to_log():
        targets = _merge(base, adapter, out)
        AutoTokenizer.from_pretrained(adapter).save_pretrained(out)
    with waiting("Comparing the merged weights with the base's"):
        return compare_weights(_load_weights(base), _load_weights(out), targets - unused_modules(adapter))


def prove_full(base: Path, trained: Path) -> MergeSummary:
    """The same proof for a model of which every weight was trained.

    Args:
        base: folder of the base model.
        trained: folder of what became of it.

    Raises:
        TrainingError: a linear layer has the base's weights still.
    """

    with waiting("Comparing the trained weights with the base's"), library_output_to_log():
        return compare_weights(_load_weights(base), _load_weights(trained), set(layer_widths(base)), others_change=True)


def unused_modules(adapter: Path) -> set[str]:
    """Modules to which AdaLoRA gave no rank in the end: they keep the base's weights, as they must."""
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    unused = {
        name for name, kept in (config.get("rank_pattern") or {}).items() if isinstance(kept, list) and not any(kept)
    }
    return {name.partition(".lora_")[0].removeprefix(_PEFT_PREFIX) for name in unused}


def compare_weights(
    base: "dict[str, torch.Tensor]",
    merged: "dict[str, torch.Tensor]",
    targets: set[str],
    *,
    others_change: bool = False,
) -> MergeSummary:
    """Raises unless the targeted modules' weights differ, and no others.

    Args:
        base, merged: tensors by parameter name.
        targets: modules that the adapter names, as `model.layers.0.mlp.up_proj`.
        others_change: embeddings, norms and biases may differ too.

    Raises:
        TrainingError: names the first module that is wrong.
    """
    expected = {f"{module}.weight" for module in targets}
    if unknown := sorted(expected - set(base)):
        raise _failed(f"the adapter targets {unknown[0]!r}, which the base model does not have")
    if set(base) != set(merged):
        raise _failed(f"tensor {min(set(base) ^ set(merged))!r} is in only one of base and merged model")
    shares, changes = [], []
    for name in sorted(base):
        differs = base[name] != merged[name]
        if name not in expected and not others_change and differs.any():
            raise _failed(f"tensor {name!r} differs from the base's, and the adapter does not target it")
        if name in expected:
            if not differs.any():
                raise _failed(f"module {name.removesuffix('.weight')!r} still has the base's weights")
            shares.append(float(differs.float().mean()))
            changes.append(float((base[name] - merged[name]).abs().max()))
    if not shares:
        raise _failed("the adapter targets no module")
    return MergeSummary(len(shares), min(shares), max(changes))


def _merge(base: Path, adapter: Path, out: Path) -> set[str]:
    """Merges, writes, and returns the modules that the adapter's config or file names."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    from trainer.model.peft_config import load_adapter

    model = load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    layers = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        layers |= {name.partition(".lora_")[0] for name in file.keys() if ".lora_" in name}  # noqa: SIM118
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise _failed(f"{adapter} cannot be merged: {error}") from error
    merged.to(torch.bfloat16).save_pretrained(out)
    return {name.removeprefix(_PEFT_PREFIX) for name in layers}


def _load_weights(folder: Path) -> "dict[str, torch.Tensor]":
    """Tensors by name, in bf16: what a folder gives to whoever loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    weights: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    return weights


def _failed(wrong: str) -> TrainingError:
    return TrainingError(
        f"the merge did not do what it must: {wrong}",
        expected="every module that the adapter targets changes, and nothing else",
        todo="check that the adapter was trained on this base and that its training loss fell",
    )
