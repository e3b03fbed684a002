"""Computes bfloat16 attention as unblocked matrix products in a single autograd function, which is faster
on a CPU for short rows.

PyTorch's own CPU attention computes in small blocks, and needs a copy of each key and value for every query head that
shares them. Here, attention takes two full products in the forward pass and four in the backward pass. On rows of a
few hundred tokens, which are usual in fine-tuning, these products take between a third and four fifths of the time of
PyTorch's attention in bfloat16 (two cores with AVX-512). In float32 they are not faster. The formula is the same;
scores are rounded to bfloat16 before the softmax, as in transformers' `eager`.

Longer rows, and everything except plain attention, are left to PyTorch. Imports torch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "tuneserve"
"""Name under which this attention implementation is registered in transformers."""
_MAX_KEYS = 512
"""Maximum number of keys. With more keys, PyTorch's attention is as fast, because it skips masked
positions."""


def fuse_attention(model: PreTrainedModel) -> bool:
    """Replace PyTorch's attention in a model with the function `attention`, and return whether it was replaced.

    Weights and saved files are not affected.
    """
    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return bool(model.config._attn_implementation == NAME)  # some models reject it and keep their own


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer, with transformers' signature.

    Args:
        module: the layer; its `is_causal` is used if `kwargs` does not contain it.
        query: [batch, heads, queries, size].
        key: [batch, key heads, keys, size]; `heads` is a multiple of `key heads`.
        value: same shape as `key`.
        attention_mask: [batch or 1, 1, queries, keys], true where a query may attend; None for causal
            attention.

    Returns:
        [batch, queries, heads, size], and None in place of the attention weights.
    """
    if not _is_plain(module, (query, key, value), attention_mask, dropout, kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    queries, size = query.shape[2:]
    if attention_mask is None:
        attention_mask = torch.ones(queries, queries, dtype=torch.bool).tril()[None, None]
    scale = size**-0.5 if scaling is None else scaling
    output: Tensor = _Attention.apply(query, key, value, ~attention_mask, scale)
    return output.transpose(1, 2).contiguous(), None


def _is_plain(
    module: torch.nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    dropout: float,
    others: dict[str, Any],
) -> bool:
    """Return whether the call computes plain softmax(s Q K^T) V with a mask shared by all heads, and has few enough
    keys for this module to be faster.
    """
    query, key, value = inputs
    if key.shape != value.shape or any(tensor.dtype is not torch.bfloat16 for tensor in inputs):
        return False
    causal = others.get("is_causal")
    if mask is None:
        if not (getattr(module, "is_causal", True) if causal is None else causal) or query.shape[2] != key.shape[2]:
            return False
    elif mask.dtype is not torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return False
    special = any(others.get(name) is not None for name in ("position_bias", "cache"))
    return dropout == 0 and not special and key.shape[2] <= _MAX_KEYS


class _Attention(torch.autograd.Function):
    """Computes softmax(s Q K^T) V. Queries that share a key head are stacked into one matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, masked: Tensor, scale: float) -> Tensor:
        """Compute the attention output and save what the backward pass needs.

        Args:
            query: [batch, heads, queries, size].
            key: [batch, key heads, keys, size].
            value: same shape as `key`.
            masked: [batch or 1, 1, queries, keys], true where a query must not attend.
            scale: factor by which the scores are multiplied.
        """
        batch, groups, keys, size = key.shape
        rows = query.reshape(batch * groups, -1, size)
        key, value = key.reshape(batch * groups, keys, size), value.reshape(batch * groups, keys, size)
        scores = torch.bmm(rows * scale, key.transpose(1, 2))
        scores.view(batch, -1, query.shape[2], keys).masked_fill_(masked, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        output = torch.bmm(weights, value)
        ctx.save_for_backward(rows, key, value, weights, output)
        ctx.scale, ctx.shapes = scale, (query.shape, (batch, groups, keys, size))
        return output.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Apply the chain rule. The softmax gradient follows FlashAttention (Dao et al. 2022, appendix B.2)."""
        rows, key, value, weights, output = ctx.saved_tensors
        gradient = gradient.reshape(output.shape)
        for_value = torch.bmm(weights.transpose(1, 2), gradient)
        for_scores = torch.bmm(gradient, value.transpose(1, 2))
        for_scores.sub_((gradient * output).sum(-1, keepdim=True)).mul_(weights)
        for_query = torch.bmm(for_scores, key).mul_(ctx.scale)
        for_key = torch.bmm(for_scores.transpose(1, 2), rows).mul_(ctx.scale)
        shape, key_shape = ctx.shapes
        return for_query.view(shape), for_key.view(key_shape), for_value.view(key_shape), None, None
