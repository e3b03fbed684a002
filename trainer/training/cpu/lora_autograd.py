"""Computes each LoRA linear layer in one autograd function, whereas PEFT's forward needs ten operations.

Under bf16 autocast, PEFT casts a layer's input to float32, the adapter's data type, and autocast casts it back. The
adapter's output is then scaled and added to the layer's output, and the sum is cast once more. Each of these operations
stores a tensor for the backward pass. On a CPU these passes over memory take as long as the matrix products.

Here the adapter's small weights are cast instead of the layer's large inputs, the update is added by the same matrix
product that computes it, and layers with the same input store the input once. The formula is the same, but values are
rounded to bf16 at different points.

Supports only plain LoRA on `torch.nn.Linear`; every other layer uses PEFT's own forward. Imports torch
and PEFT.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def fuse_lora(model: torch.nn.Module) -> int:
    """Replace the forward of every plain LoRA layer in a model, and return the number of layers replaced.

    Weights and their names do not change, so checkpoints and merges are not affected.
    """
    layers = [layer for layer in model.modules() if type(layer) is Linear and type(layer.base_layer) is torch.nn.Linear]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)
    return len(layers)


def _forward(layer: Linear, original: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a layer's output, in one autograd function if the layer is plain LoRA. This is checked at each call,
    because the adapter may have been disabled, merged or replaced.
    """
    if args or kwargs or not _is_plain(layer, x):
        return original(x, *args, **kwargs)
    (name,) = layer.active_adapters
    base = layer.base_layer
    low, high = layer.lora_A[name].weight, layer.lora_B[name].weight
    fused: Tensor = _LoraLinear.apply(x, base.weight, base.bias, low, high, layer.scaling[name])
    return fused


def _is_plain(layer: Linear, x: Tensor) -> bool:
    """Return whether a layer computes W x + b + s B A x in W's dtype, with a frozen W and without dropout."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return False
    dropout, base = layer.lora_dropout[name], layer.base_layer
    if layer.training and not isinstance(dropout, torch.nn.Identity) and dropout.p > 0:
        return False
    device = x.device.type
    work = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return work == x.dtype == base.weight.dtype and not base.weight.requires_grad


class _LoraLinear(torch.autograd.Function):
    """Computes y = W x + b + s B A x, with gradients for x, A and B.

    The update s B A is added to the outputs, or, in float32 with many rows, to the weight, which is then the smaller
    tensor. In 16 bits the update is never added to the weight: the update is smaller than the spacing between 16-bit
    numbers, and would be rounded away. The same happens, undetected, in float32 products that PyTorch computes with
    fewer bits (`torch.set_float32_matmul_precision`).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, high: Tensor, scaling: float
    ) -> Tensor:
        """Compute the layer's output and save what the backward pass needs.

        Args:
            x: [..., in].
            weight: [out, in]; like `bias`, which is [out], it gets no gradient.
            low: A, [rank, in].
            high: B, [out, rank].
        """
        rows = x.reshape(-1, x.shape[-1])
        small_low, small_high = low.to(x.dtype), (high * scaling).to(x.dtype)
        inner = rows @ small_low.T
        if _fits_into_weight(x.dtype, len(rows), rows.shape[1]):
            y = linear(rows, torch.addmm(weight, small_high, small_low), bias)
        else:
            y = linear(rows, weight, bias).addmm_(inner, small_high.T)
        ctx.save_for_backward(rows, inner, weight, small_low, small_high)
        ctx.scaling, ctx.shape, ctx.types = scaling, x.shape, (low.dtype, high.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Apply the chain rule. The saved B is already multiplied by the scale s.

        The updated weight is recomputed, because storing it for every layer would need as much memory as the
        model.
        """
        rows, inner, weight, low, high = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        inner_gradient = gradient @ high
        for_low = (inner_gradient.T @ rows).to(ctx.types[0]) if ctx.needs_input_grad[3] else None
        for_high = (gradient.T @ inner).to(ctx.types[1]) * ctx.scaling if ctx.needs_input_grad[4] else None
        for_x = None
        if ctx.needs_input_grad[0]:
            if _fits_into_weight(rows.dtype, len(rows), gradient.shape[1]):
                for_x = gradient @ torch.addmm(weight, high, low)
            else:
                for_x = (gradient @ weight).addmm_(inner_gradient, low)
            for_x = for_x.view(ctx.shape)
        return for_x, None, None, for_low, for_high, None


def _fits_into_weight(number_type: torch.dtype, rows: int, width: int) -> bool:
    """Return whether adding the update to the weight, instead of to the product, is cheaper and exact enough.

    A matrix of shape [rows, width] is multiplied by the weight or its transpose, [width, columns], which gives a
    product of shape [rows, columns]. The update is added to the smaller of the product and the weight.
    """
    return number_type is torch.float32 and rows > width
