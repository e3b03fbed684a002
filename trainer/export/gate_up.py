"""Puts together what gptqmodel takes apart: a model's feed-forward layers that are two in one, as Phi-3's.

gptqmodel quantizes Phi-3's `gate_up_proj` as `gate_proj` and `up_proj` and writes these; the engine looks for the names
of the architecture. GPTQ rounds each row of a layer by itself, with statistics of the layer's inputs, and those are the
same for both, so that the two side by side are what quantizing the whole would have given. Knows nothing of rounding.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from svc.errors import TrainingError
from svc.registry.files import read_headers

if TYPE_CHECKING:
    import torch

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj")}
# Tensors of a packed layer, with the dimension along which its outputs lie.
_OUTPUT_DIMENSION = {"qweight": 1, "qzeros": 1, "scales": 1, "bias": 0}
_INPUT_GROUPS = "g_idx"


def join_fused_layers(folder: Path, layers: list[str]) -> None:
    """Writes a quantized model's safetensors again, if one of its layers was taken apart; else does nothing.

    Args:
        folder: the quantized model.
        layers: names of the layers that the architecture has.

    Raises:
        TrainingError: two parts group their inputs differently.
    """
    written = {tensor.name for tensor in read_headers(folder)}
    apart = {layer: parts for layer in layers if (parts := _parts(layer)) and f"{parts[0]}.qweight" in written}
    if not apart:
        return
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    for layer, parts in apart.items():
        _join(tensors, layer, parts)
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})


def _parts(layer: str) -> list[str]:
    module, _, name = layer.rpartition(".")
    return [f"{module}.{part}" for part in _PARTS.get(name, ())]


def _join(tensors: "dict[str, torch.Tensor]", layer: str, parts: list[str]) -> None:
    """Replaces the tensors of the parts by those of the layer."""
    import torch

    groups = [tensors.pop(f"{part}.{_INPUT_GROUPS}") for part in parts]
    if any(not torch.equal(group, groups[0]) for group in groups):
        raise TrainingError(
            f"{' and '.join(parts)} were quantized with different groups of inputs",
            expected=f"the same groups, because the engine has them as one layer {layer!r}",
            todo="serve this model merged, without GPTQ",
        )
    tensors[f"{layer}.{_INPUT_GROUPS}"] = groups[0]
    for kind, dimension in _OUTPUT_DIMENSION.items():
        if f"{parts[0]}.{kind}" in tensors:
            tensors[f"{layer}.{kind}"] = torch.cat([tensors.pop(f"{part}.{kind}") for part in parts], dim=dimension)
