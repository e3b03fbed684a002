"""Quantizes a merged model to 8 bits in the compressed-tensors layout: INT8 or FP8 weights, rounded to nearest.

Each output of a linear layer has its own scale, and the engine quantizes activations token by token, so no calibration
is needed. The files are written here instead of by a library: llmcompressor needs a different release of
compressed-tensors from the one that vLLM pins, and vLLM cannot load gptqmodel's FP8 files. Embeddings, norms and the
output head stay in 16 bits.
"""

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svc.errors import TrainingError
from svc.model_folder.weight_files import weight_files
from svc.registry.files import read_headers
from svc.terminal import waiting
from svc.version import Format
from trainer.base_model.content import copy_shipped_files
from trainer.library_output import library_output_to_log
from trainer.model.experts import fused_experts
from trainer.model.layer_shapes import empty_model, linear_layers

if TYPE_CHECKING:
    import torch

SCALE_SUFFIX = "_scale"
"""Suffix that is appended to a weight's name to form the name of its scale tensor."""
_NUMBERS = {Format.INT8: ("int", "int-quantized"), Format.FP8: ("float", "float-quantized")}
"""Values of `type` and of the layout's `format` in the quantization config, keyed by the version's format."""


@dataclass(frozen=True, slots=True)
class RoundingSummary:
    """Summary of a quantization to 8 bits.

    Attributes:
        layers: number of quantized linear layers.
        seconds: total time.
    """

    layers: int
    seconds: float


def quantize_to_8_bits(model: Path, out: Path, format: Format) -> RoundingSummary:
    """Write a model to `out` with 8-bit weights, and with its tokenizer and chat template.

    Tensors are read, rounded and written one by one, so memory use depends on the largest tensor.

    Args:
        model: folder of the merged model.
        out: output folder, created if missing.
        format: INT8 or FP8.

    Raises:
        TrainingError: see `check_layers`.
    """
    started = time.monotonic()
    layers = [f"{name}.weight" for name in check_layers(model)]
    with waiting(f"Rounding the merged weights to {format}"), library_output_to_log(), ExitStack() as stack:
        import torch
        from safetensors import safe_open

        from trainer.export.tensor_files import open_tensor_files

        files = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(model)]
        stored = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        quantized, shapes = set(layers), {}
        for name, file in stored.items():
            shape = file.get_slice(name).get_shape()
            dtype = _dtype(format) if name in quantized else torch.bfloat16
            shapes[name] = torch.empty(shape, dtype=dtype, device="meta")
            if name in quantized:
                shapes[name + SCALE_SUFFIX] = torch.empty(shape[0], 1, dtype=torch.float32, device="meta")
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name, file in stored.items())
        with open_tensor_files(out, shapes, parameters) as write:
            for name, file in stored.items():
                tensor = file.get_tensor(name)
                if name in quantized:
                    tensor, scales = round_to_nearest(tensor, format)
                    write(name + SCALE_SUFFIX, scales)
                write(name, tensor.to(shapes[name].dtype))
    copy_shipped_files(model, out, quantization_config(format))
    return RoundingSummary(layers=len(layers), seconds=time.monotonic() - started)


def check_layers(model: Path) -> dict[str, tuple[int, int]]:
    """Return the input and output sizes of the linear layers to quantize, keyed by name, without loading weights.

    Raises:
        TrainingError: the model is a mixture of experts, has no linear layers, or does not store the weight of a
            linear layer as LAYER.weight.
    """
    empty = empty_model(model)
    if experts := fused_experts(empty):
        raise TrainingError(
            f"{experts[0]!r} is part of a mixture of experts, which cannot be quantized to 8 bits",
            expected="a model without experts",
            todo="remove int8 and fp8 from `formats`, or choose another base",
        )
    layers, stored = linear_layers(empty), {tensor.name for tensor in read_headers(model)}
    if missing := next((name for name in layers or ("*",) if f"{name}.weight" not in stored), None):
        raise TrainingError(
            f"{model} has no tensor {missing + '.weight'!r}, the weight of a linear layer",
            expected="a tensor named LAYER.weight for every linear layer",
            todo="remove int8 and fp8 from `formats`",
        )
    return layers


def round_to_nearest(weight: "torch.Tensor", format: Format) -> "tuple[torch.Tensor, torch.Tensor]":
    """Round a layer's weights to 8 bits.

    Args:
        weight: [outputs, inputs].

    Returns:
        The rounded weights and their float32 scales, [outputs, 1].
    """
    import torch

    dtype = _dtype(format)
    largest = float(torch.iinfo(dtype).max if format is Format.INT8 else torch.finfo(dtype).max)
    exact = weight.float()
    scales = exact.abs().amax(dim=1, keepdim=True) / largest
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))  # a row of zeros stays zero
    steps = exact / scales
    steps = steps.round() if format is Format.INT8 else steps
    return steps.clamp(-largest, largest).to(dtype), scales


def quantization_config(format: Format) -> dict[str, Any]:
    """Return the quantization config of an 8-bit model, in the form that vLLM and transformers read."""
    kind, layout = _NUMBERS[format]
    numbers = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": numbers | {"strategy": "channel", "dynamic": False},
        "input_activations": numbers | {"strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _dtype(format: Format) -> "torch.dtype":
    import torch

    return torch.int8 if format is Format.INT8 else torch.float8_e4m3fn
