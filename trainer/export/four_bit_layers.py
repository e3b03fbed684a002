"""Checks that a model's layers can be quantized to 4 bits and served, without loading weights."""

import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from svc.errors import RecipeError, TrainingError
from svc.registry.files import read_headers
from trainer.library_output import library_output_to_log
from trainer.model.config import load_config
from trainer.model.experts import fused_experts
from trainer.model.layer_shapes import empty_model, linear_layers
from trainer.recipe.quantize import Quantize

_FUSED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)
"""Layers that the engine fuses into a single layer."""
_QUANTIZED_MIXTURES = ("olmoe", "qwen3_moe")
"""Mixture-of-experts models for which gptqmodel 7.6 quantizes every expert and keeps the base's tensor names. It
silently skips the experts of GraniteMoE and MiniMax M2, and renames the experts of Mixtral, Phi-3.5-MoE and gpt-oss."""
_EXPERT = re.compile(r"(.+\.experts\.\d+\.\w+)\.weight")


def check_layers(model: Path, group_size: int, multiple: int = 1) -> list[str]:
    """Check the shapes of the layers to quantize and return their names, without loading weights.

    Args:
        group_size: number of inputs that share a scale; it must divide the number of inputs of every layer.
        multiple: number that must divide the number of outputs of each engine layer. It is greater than 1 for an engine
            on a CPU.

    Raises:
        RecipeError: `group_size` does not divide a layer's width; the message names the layer and the sizes
            that would fit.
        TrainingError: the engine's kernel for 4-bit weights does not support a layer, or an expert cannot be
            quantized or served.
    """
    empty = empty_model(model)
    shapes = linear_layers(empty)
    if experts := fused_experts(empty):
        _check_experts(model, experts[0], on_cpu=multiple > 1)
        shapes |= _expert_shapes(model)
    _check_inputs({name: inputs for name, (inputs, _) in shapes.items()}, group_size)
    _check_outputs({name: outputs for name, (_, outputs) in shapes.items()}, multiple)
    return list(shapes)


def check_quantizer(model: Path) -> None:
    """Check that gptqmodel has a definition of the model's architecture. Without a definition, gptqmodel would guess
    the layers.

    Raises:
        TrainingError: gptqmodel has no definition of the architecture.
    """
    with library_output_to_log():
        from gptqmodel.models.auto import SUPPORTED_MODELS
    family = load_config(model).model_type
    if family not in SUPPORTED_MODELS:
        raise TrainingError(
            f"gptqmodel {version('gptqmodel')} cannot quantize {family!r}, the model_type of {model}",
            expected="an architecture that gptqmodel supports",
            todo="set `formats: [merged]` to skip quantization, or choose another base",
        )


def _check_experts(model: Path, expert: str, *, on_cpu: bool) -> None:
    import torch

    family = load_config(model).get_text_config().model_type
    if family not in _QUANTIZED_MIXTURES:
        raise TrainingError(
            f"{expert!r} is part of a mixture of experts, and the experts of {family!r} models cannot be "
            "quantized for the engine",
            expected=f"a model of type {' or '.join(_QUANTIZED_MIXTURES)}, or a model without experts",
            todo="set `formats: [merged]` to skip quantization, or choose another base",
        )
    if on_cpu and not torch.cpu._is_amx_tile_supported():
        raise TrainingError(
            f"{expert!r} is part of a mixture of experts, and the engine does not support 4-bit experts on this CPU",
            expected="a CPU with AMX, or a GPU",
            todo="set `formats: [merged]` to skip quantization, or train and serve on a GPU",
        )


def _expert_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Return the input and output sizes of each expert's matrices, keyed by name. These matrices are stored separately
    in the files but are joined in memory.
    """
    shapes = {match[1]: tensor.shape for tensor in read_headers(model) if (match := _EXPERT.fullmatch(tensor.name))}
    return {name: (inputs, outputs) for name, (outputs, inputs) in shapes.items()}


def _check_inputs(widths: dict[str, int], group_size: int) -> None:
    misfit = next((name for name, width in widths.items() if width % group_size), None)
    if misfit is None:
        return
    sizes = get_args(Quantize.model_fields["group_size"].annotation)
    fitting = [str(size) for size in sizes if not any(width % size for width in widths.values())]
    raise RecipeError(
        f"quantize.group_size is {group_size}, but layer {misfit!r} has {widths[misfit]} inputs",
        expected="a group size that divides the number of inputs of every layer: "
        f"{', '.join(fitting) or f'none of {sizes} divides them all'}",
        todo=f"set quantize.group_size to {fitting[-1]}" if fitting else "set `formats: [merged]` to skip quantization",
    )


def _check_outputs(outputs: dict[str, int], multiple: int) -> None:
    fused: Counter[str] = Counter()
    for name, size in outputs.items():
        module, _, layer = name.rpartition(".")
        fused[f"{module}.{_FUSED.get(layer, layer)}"] += size
    misfit = next((name for name, size in fused.items() if size % multiple), None)
    if misfit is not None:
        raise TrainingError(
            f"layer {misfit!r} has {fused[misfit]} outputs",
            expected=f"a multiple of {multiple} outputs, which 4-bit formats require on this device",
            todo="choose another base, or train and serve on a GPU",
        )
