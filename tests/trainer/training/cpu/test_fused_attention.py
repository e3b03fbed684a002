"""Tests that attention by matrix products equals PyTorch's attention, the fallback for unsupported cases."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainer.training.cpu import fused_attention
from trainer.training.cpu.fused_attention import attention, fuse_attention


@pytest.fixture(autouse=True)
def whole_products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Record the shapes of queries that were computed by matrix products rather than by PyTorch."""
    seen: list[torch.Size] = []
    apply = fused_attention._Attention.apply

    def counted(query: torch.Tensor, *others: Any) -> Any:
        seen.append(query.shape)
        return apply(query, *others)

    monkeypatch.setattr(fused_attention._Attention, "apply", counted)
    return seen


class Layer(torch.nn.Module):
    """The layer attributes that transformers reads."""

    def __init__(self, heads_per_key: int, is_causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups = heads_per_key
        self.is_causal = is_causal


def tensors(
    batch: int, heads: int, groups: int, queries: int, before: int, size: int, seed: int = 0
) -> list[torch.Tensor]:
    """Return query, key and value in the layout that models use, with heads adjacent in memory."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, length, number, size, generator=generator).bfloat16().transpose(1, 2)
        for length, number in ((queries, heads), (queries + before, groups), (queries + before, groups))
    ]


SCALING = 0.3


def check(layer: Layer, inputs: list[torch.Tensor], mask: torch.Tensor | None) -> None:
    """Check that results match PyTorch's in float64 within bfloat16 precision, even where a gradient must be 0.

    The tolerance is a share of the same sums over absolute values, that is, of all rounded terms before any
    of them cancel.
    """
    exact = [tensor.double() for tensor in inputs]
    wanted = results(sdpa_attention_forward, layer, exact, mask)
    sums = absolute_sums(layer, exact, mask)
    for result, expected, rounded in zip(results(attention, layer, inputs, mask), wanted, sums, strict=True):
        assert (result.double() - expected).norm() <= 2 * torch.finfo(torch.bfloat16).eps * rounded.norm()


def results(function: Any, layer: Layer, inputs: list[torch.Tensor], mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Return the output and all gradients of a function."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output, weights = function(layer, *inputs, mask, scaling=SCALING)
    assert weights is None
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient_of(output))]


def gradient_of(output: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)


def absolute_sums(layer: Layer, inputs: list[torch.Tensor], mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Return the sums of absolute values for the output and for the gradients of query, key and value."""
    query, key, value = inputs
    shared = (key.shape[1], layer.num_key_value_groups)
    key, value = (tensor.repeat_interleave(shared[1], 1) for tensor in (key, value))
    scores = SCALING * query @ key.mT
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    output = (shares @ value.abs()).transpose(1, 2)
    outer = gradient_of(output).transpose(1, 2).abs()
    of_shares = shares * (outer @ value.abs().mT)
    of_scores = SCALING * (of_shares + shares * of_shares.sum(-1, keepdim=True))
    of_keys, of_values = of_scores.mT @ query.abs(), shares.mT @ outer
    return [output, of_scores @ key.abs(), *(each.unflatten(1, shared).sum(2) for each in (of_keys, of_values))]


def causal(batch: int, queries: int, before: int) -> torch.Tensor:
    return torch.ones(queries, queries + before, dtype=torch.bool).tril(before).expand(batch, 1, -1, -1)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    heads_per_key=st.integers(1, 3),
    queries=st.integers(1, 40),
    before=st.integers(0, 20),
    size=st.sampled_from([1, 4, 16]),
    masked=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_fused_attention_output_and_gradients_match_pytorch(
    whole_products: list[torch.Size],
    batch: int,
    groups: int,
    heads_per_key: int,
    queries: int,
    before: int,
    size: int,
    masked: bool,
    seed: int,
) -> None:
    before = before if masked else 0  # without a mask there are no keys before the queries
    whole_products.clear()
    inputs = tensors(batch, groups * heads_per_key, groups, queries, before, size, seed)
    check(Layer(heads_per_key), inputs, causal(batch, queries, before) if masked else None)
    assert whole_products == [inputs[0].shape]


def test_fused_attention_applies_a_separate_mask_to_each_row_of_a_batch(whole_products: list[torch.Size]) -> None:
    """Packed examples of different lengths need different masks."""
    mask = causal(2, 6, 0).clone()
    mask[0, :, 3:, :3] = False
    mask[1, :, 2:, :2] = False
    check(Layer(2), tensors(2, 4, 2, 6, 0, 8), mask)
    assert len(whole_products) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.5},
        {"position_bias": torch.zeros(1, 4, 6, 6)},
        {"attention_mask": torch.zeros(2, 1, 6, 6)},
        {"attention_mask": causal(2, 6, 0).expand(-1, 4, -1, -1)},
        {"is_causal": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fused_attention_falls_back_to_pytorch_for_unsupported_attention_variants(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(fused_attention, "sdpa_attention_forward", lambda *args, **kwargs: ("pytorch", None))
    query, key, value = tensors(2, 4, 2, 6, 0, 8)
    arguments: dict[str, Any] = {"attention_mask": None} | change
    assert attention(Layer(2), query, key, value, **arguments)[0] == "pytorch"


def with_value_heads_of(size: int, number_type: torch.dtype) -> list[torch.Tensor]:
    query, key, value = (tensor.to(number_type) for tensor in tensors(2, 4, 2, 6, 0, 8))
    return [query, key, value[..., :size]]


@pytest.mark.parametrize(("size", "number_type"), [(4, torch.bfloat16), (8, torch.float32), (4, torch.float32)])
def test_fused_attention_falls_back_to_pytorch_for_unsupported_dtypes_or_value_head_sizes(
    whole_products: list[torch.Size], size: int, number_type: torch.dtype
) -> None:
    """In multi-head latent attention, value heads have a different size."""
    query, key, value = with_value_heads_of(size, number_type)
    output, _ = attention(Layer(2), query, key, value, None)
    assert output.shape == (2, 6, 4, size)
    assert not whole_products


def test_fused_attention_falls_back_to_pytorch_for_long_sequences(
    whole_products: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = tensors(2, 4, 2, 6, 0, 8)
    for longest, calls in ((5, 0), (6, 1)):
        monkeypatch.setattr(fused_attention, "_MAX_KEYS", longest)
        attention(Layer(2), query, key, value, None)
        assert len(whole_products) == calls


def tiny_model(implementation: str) -> Any:
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.bfloat16)


def test_fused_attention_changes_neither_the_logits_nor_the_saved_config(whole_products: list[torch.Size]) -> None:
    model = tiny_model("sdpa")
    ids = torch.arange(20).view(2, 10)
    before, config = model(input_ids=ids).logits, model.config.to_json_string()
    assert fuse_attention(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0.05, atol=0.01)
    assert len(whole_products) == 2
    assert model.config.to_json_string() == config


def test_attention_is_not_fused_when_the_model_requires_eager_attention() -> None:
    """For example, only `eager` supports soft-capped scores."""
    model = tiny_model("eager")
    assert not fuse_attention(model)
    assert model.config._attn_implementation == "eager"
