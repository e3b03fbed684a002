"""Converts gptqmodel's files to the layout of the model architecture and of the source model.

gptqmodel quantizes and writes fused feed-forward layers, such as Phi-3's `gate_up_proj`, as `gate_proj` and `up_proj`,
but the engine looks for the architecture's names. Concatenating the two gives the same result as quantizing the fused
layer: GPTQ rounds each row of a layer separately, and uses statistics of the layer's inputs, which are the same for
both parts. This module does no rounding itself.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from svc.errors import TrainingError
from svc.files.json_file import read_json_object
from svc.registry.files import read_headers
from trainer.base_model.content import CONFIG_FILE, copy_shipped_files

if TYPE_CHECKING:
    import torch

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj")}
# Tensors of a packed layer, with the dimension of its outputs.
_OUTPUT_DIMENSION = {"qweight": 1, "qzeros": 1, "scales": 1, "bias": 0}
_INPUT_GROUPS = "g_idx"
_VOLATILE_KEYS = {"offload_to_disk_path"}  # of gptqmodel's metadata; they differ in every run


def write_bfloat16(folder: Path) -> None:
    """Convert a quantized model's unquantized float32 weights to bf16.

    These weights come from a merged model in bf16, so nothing is rounded. Packed layers keep their types.
    """
    import torch

    tensors = _read(folder)
    for name, tensor in tensors.items():
        if tensor.dtype is torch.float32:
            tensors[name] = tensor.to(torch.bfloat16)
    _write(folder, tensors)


def join_fused_layers(folder: Path, layers: list[str]) -> None:
    """Rewrite a quantized model's safetensors so that layers split by gptqmodel are joined again.

    Args:
        folder: the quantized model.
        layers: names of the layers in the model architecture.

    Raises:
        TrainingError: the parts of a layer were quantized with different input groups.
    """
    written = {tensor.name for tensor in read_headers(folder)}
    split = {layer: parts for layer in layers if (parts := _parts(layer)) and f"{parts[0]}.qweight" in written}
    if not split:
        return
    tensors = _read(folder)
    for layer, parts in split.items():
        _join(tensors, layer, parts)
    _write(folder, tensors)


def _read(folder: Path) -> "dict[str, torch.Tensor]":
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _write(folder: Path, tensors: "dict[str, torch.Tensor]") -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})


def _parts(layer: str) -> list[str]:
    module, _, name = layer.rpartition(".")
    return [f"{module}.{part}" for part in _PARTS.get(name, ())]


def _join(tensors: "dict[str, torch.Tensor]", layer: str, parts: list[str]) -> None:
    """Replace the tensors of a split layer's parts with the tensors of the joined layer."""
    import torch

    groups = [tensors.pop(f"{part}.{_INPUT_GROUPS}") for part in parts]
    if any(not torch.equal(group, groups[0]) for group in groups):
        raise TrainingError(
            f"the inputs of {' and '.join(parts)} were divided into different groups for quantization",
            expected=f"the same quantization groups in all of these layers, because the engine fuses them into {layer}",
            todo="set `formats: [merged]` to skip quantization",
        )
    tensors[f"{layer}.{_INPUT_GROUPS}"] = groups[0]
    for kind, dimension in _OUTPUT_DIMENSION.items():
        if f"{parts[0]}.{kind}" in tensors:
            tensors[f"{layer}.{kind}"] = torch.cat([tensors.pop(f"{part}.{kind}") for part in parts], dim=dimension)


def check_packed(folder: Path, layers: list[str]) -> None:
    """Check that each of the given layers is stored in packed form in a quantized model.

    Raises:
        TrainingError: a layer is not packed.
    """
    written = {tensor.name for tensor in read_headers(folder)}
    if missing := [name for name in layers if f"{name}.qweight" not in written]:
        raise TrainingError(
            f"{len(missing)} of {len(layers)} layers were not quantized; the first is {missing[0]!r}",
            expected="every linear layer quantized to 4 bits",
            todo="check the log for gptqmodel's reason; raising quantize.samples may help",
        )


def finish_folder(model: Path, out: Path) -> None:
    """Replace the config, tokenizer and templates that gptqmodel wrote with the model's own.

    gptqmodel writes the config as changed by its loader. For Gemma 3, this config specified the RoPE frequencies twice,
    in two different forms. Only the quantization config is kept, without the keys that differ between two runs on the
    same input.
    """
    (out / "quant_log.csv").unlink(missing_ok=True)
    path = out / "quantize_config.json"
    standalone, quantization = read_json_object(path), read_json_object(out / CONFIG_FILE)["quantization_config"]
    for written in (standalone, quantization):
        for key in _VOLATILE_KEYS & set(written.get("meta") or {}):
            del written["meta"][key]
    path.write_text(json.dumps(standalone, indent=2, sort_keys=True) + "\n", "utf-8")
    copy_shipped_files(model, out, quantization)
