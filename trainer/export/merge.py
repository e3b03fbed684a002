"""Merges an adapter into its base model, and verifies the result."""

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svc.terminal import waiting
from trainer.base_model.content import copy_shipped_files
from trainer.export.verify_merge import MergeSummary, adapted_tensors, compare_weights, merge_failed
from trainer.library_output import library_output_to_log
from trainer.model.layer_shapes import empty_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from trainer.model.stored_weights import StoredWeights

_PEFT_PREFIX = "base_model.model."  # before every name in an adapter's file
_ADAPTER_TENSOR = re.compile(r"\.(lora|vera)_|\.token_adapter\.trainable_tokens_delta$")
_NEW_ROWS = ".token_adapter.trainable_tokens_delta"


def merge_adapter(base: Path, adapter: Path, out: Path, *, dequantized: bool = False) -> MergeSummary:
    """Merge an adapter into its base and write the result to `out` as bf16 safetensors, with the base's
    unchanged tokenizer and templates.

    The sum is computed in float32 and rounded so that small changes are not lost (`trainer.model.rounding`).
    Tensors are read, merged, written and compared one by one, so memory use depends on the largest tensor,
    not on the size of the model.

    Args:
        base: folder of the model that the adapter was trained on.
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        dequantized: whether to add the adapter to the base's weights rounded to NF4, on which it was
            trained. Linear layers without an adapter are then rounded too.

    Raises:
        TrainingError: a module that the adapter targets still has the base's weights, another tensor
            differs, or the adapter has tensors that are not part of an adapted layer.
    """
    with waiting("Merging the adapter into the base model"), library_output_to_log():
        from trainer.model.nf4 import DequantizedWeights
        from trainer.model.stored_weights import StoredWeights

        weights = DequantizedWeights(base) if dequantized else StoredWeights(base)
        changed = _merge(base, weights, adapter, out)
        rows = _all_rows(weights, adapter)
    copy_shipped_files(base, out)
    with waiting("Comparing the merged weights with the base weights"), library_output_to_log():
        return compare_weights(weights, StoredWeights(out), changed, rows=rows)


def unused_modules(adapter: Path) -> set[str]:
    """Return the modules whose rank AdaLoRA has reduced to 0. A merge is expected to leave their weights
    unchanged.
    """
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    unused = {
        name for name, mask in (config.get("rank_pattern") or {}).items() if isinstance(mask, list) and not any(mask)
    }
    return {name.partition(".lora_")[0].removeprefix(_PEFT_PREFIX) for name in unused}


def trained_rows(adapter: Path) -> dict[str, list[int]]:
    """Return the ids of new tokens whose rows an adapter contains, keyed by layer."""
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    return dict(config.get("trainable_token_indices") or {})


def _all_rows(weights: "StoredWeights", adapter: Path) -> dict[str, list[int]]:
    """Return the rows of new tokens, keyed by parameter, including the rows of an output head that is tied to the
    embedding.
    """
    rows = {f"{layer}.weight": ids for layer, ids in trained_rows(adapter).items()}
    tied = {target: rows[source] for target, source in weights.model.all_tied_weights_keys.items() if source in rows}
    return rows | tied


def _merge(base: Path, weights: "StoredWeights", adapter: Path, out: Path) -> set[str]:
    """Merge and write the model. Return the modules and parameters whose weights the merge should change."""
    import torch
    from safetensors import safe_open

    from trainer.export.tensor_files import open_tensor_files
    from trainer.model.peft_config import load_adapter
    from trainer.model.rounding import StochasticRounding

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        tensors = list(file.keys())
    if unexpected := [name for name in tensors if not _ADAPTER_TENSOR.search(name)]:
        raise merge_failed(f"{adapter} contains tensor {unexpected[0]!r}, which is not part of an adapted layer")
    model = load_adapter(_without_weights(base), adapter)
    layers = adapted_tensors(model)
    named = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
    targets = {name.removeprefix(_PEFT_PREFIX) for name in named} | set(layers)
    changed = {layers.get(layer, layer) for layer in targets} - unused_modules(adapter)
    merge_layer = {
        name if name in weights else f"{name}.weight": partial(
            _merge_layer, model.get_base_model().get_submodule(layer)
        )
        for layer, name in layers.items()
    }
    rounding = StochasticRounding()
    rows = {f"{layer}.weight": ids for layer, ids in trained_rows(adapter).items()}

    def merged(name: str) -> torch.Tensor:
        if name in rows:
            with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
                trained = file.get_tensor(f"{_PEFT_PREFIX}{name.removesuffix('.weight')}{_NEW_ROWS}")
            return weights[name].index_copy(0, torch.tensor(rows[name]), rounding.to_bfloat16(trained.float()))
        if name not in merge_layer:
            return weights[name]
        try:
            total = merge_layer[name](weights.read(name, torch.float32))
        except ValueError as error:
            raise merge_failed(f"{adapter} cannot be merged: {error}") from error
        if name in changed or name.removesuffix(".weight") in changed:
            return rounding.to_bfloat16(total)
        return total.to(torch.bfloat16)

    with open_tensor_files(out, weights.saved_shapes(), weights.model.num_parameters()) as write:
        for group in weights.saved_together():
            for name, tensor in weights.as_saved({name: merged(name) for name in group}).items():
                write(name, tensor)
    return changed


def _merge_layer(layer: Any, weight: "torch.Tensor") -> "torch.Tensor":
    """Return a layer's weight plus its adapter's update, as PEFT computes it.

    Args:
        layer: PEFT's layer, which wraps a placeholder that has the weight's shape and takes no memory.
    """
    import torch

    base_layer, name = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
    empty = getattr(base_layer, name)
    setattr(base_layer, name, torch.nn.Parameter(weight, requires_grad=False))
    layer.merge(safe_merge=True)
    merged: torch.Tensor = getattr(base_layer, name).data
    setattr(base_layer, name, empty)
    return merged


def _without_weights(base: Path) -> "PreTrainedModel":
    """Return the base model with every weight replaced by a single zero, expanded to the shape of the weight.

    The meta device is not an option: PEFT moves an adapter to the device of its layer, so the adapter would
    lose its weights there too.
    """
    import torch

    model = empty_model(base)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    return model
