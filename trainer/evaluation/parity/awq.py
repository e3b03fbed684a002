"""Reads an AWQ model's layers in the form that they have in the source model, so that the two can be compared.

AWQ multiplies the input columns of a layer by scales, and divides the weights that produce these inputs by the same
scales: the weights of the preceding norm, or the rows of the preceding layer. Both scalings are undone here. The scales
are computed by comparing the two models: their norm weights if a norm was divided, or else the rows of the preceding
layer. Imports torch.
"""

from collections.abc import Callable, Mapping

import torch

Tensors = Mapping[str, Callable[[], torch.Tensor]]
"""Functions that each read one tensor of a model, keyed by the tensor's name."""
_NORMS = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm") | dict.fromkeys(
    ("gate_proj", "up_proj"), "post_attention_layernorm"
)
"""The norm that precedes each layer, for the architectures in trainer.export.awq."""
_SOURCES = {"o_proj": "v_proj", "down_proj": "up_proj"}
"""Maps each layer without a preceding norm to the layer whose rows produce its inputs. Between the two layers, there is
only a weighted sum (attention) or an elementwise product (gating)."""
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position of each of eight outputs in a packed integer, in units of 4 bits, counted from the lowest bits."""


def read_unscaled(before: Tensors, after: Tensors, layer: str) -> torch.Tensor:
    """Return a layer's rounded weights without its scales, as float32 numbers with shape [outputs, inputs].

    Args:
        before: the source model.
        after: the AWQ model.
        layer: name of the layer, which is the same in both models.
    """
    module, _, name = layer.rpartition(".")
    rounded = expand(after, layer)
    if norm := _NORMS.get(name):
        path = f"{module.rpartition('.')[0]}.{norm}.weight"
        rounded *= _ratio(after[path]().float(), before[path]().float())
        if fed := next((fed for fed, source in _SOURCES.items() if source == name), None):
            inputs = before[f"{module}.{fed}.weight"]().shape[1]
            rounded /= _row_scales(before, layer, rounded, inputs)[:, None]
        return rounded
    source = f"{module}.{_SOURCES[name]}"
    norm_path = f"{module.rpartition('.')[0]}.{_NORMS[_SOURCES[name]]}.weight"
    unscaled = expand(after, source) * _ratio(after[norm_path]().float(), before[norm_path]().float())
    return rounded * _row_scales(before, source, unscaled, rounded.shape[1])


def expand(tensors: Tensors, layer: str) -> torch.Tensor:
    """Unpack a layer's stored weights to float32, with shape [outputs, inputs]."""
    scales = tensors[f"{layer}.scales"]().float()
    numbers, zeros = (_unpack(tensors[f"{layer}.{kind}"]()) for kind in ("qweight", "qzeros"))
    size = len(numbers) // len(scales)
    return ((numbers - zeros.repeat_interleave(size, dim=0)) * scales.repeat_interleave(size, dim=0)).T


def _row_scales(before: Tensors, source: str, rounded: torch.Tensor, inputs: int) -> torch.Tensor:
    """Return the factor by which AWQ multiplied each row of a layer whose outputs are the next layer's inputs.

    With grouped-query attention, several inputs share a row, and no row is scaled.

    Args:
        rounded: the layer's rounded weights without the norm's scales.
        inputs: number of inputs of the next layer.
    """
    if len(rounded) != inputs:
        return torch.ones(1)
    weight = before[f"{source}.weight"]().float()
    return _ratio((rounded * weight).sum(dim=1), weight.square().sum(dim=1))


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Return the element-wise ratio of two vectors, or 1 where the divisor is 0."""
    return torch.where(below == 0, torch.ones_like(below), above / below)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """Return 4-bit numbers as float32.

    Args:
        packed: int32 of shape [rows, outputs / 8].

    Returns:
        Shape [rows, outputs].
    """
    shifts = torch.tensor([4 * place for place in _ORDER], dtype=torch.int32)
    return ((packed[:, :, None] >> shifts) & 15).float().flatten(1)
