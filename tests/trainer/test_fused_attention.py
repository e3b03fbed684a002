"""Attention as whole products is PyTorch's attention, and what it does not know goes to that."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainer import fused_attention
from trainer.fused_attention import attention, fuse_attention


class Layer(torch.nn.Module):
    """What transformers asks of a layer."""

    def __init__(self, heads_per_key: int, is_causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups = heads_per_key
        self.is_causal = is_causal


def tensors(batch: int, heads: int, groups: int, queries: int, before: int, size: int) -> list[torch.Tensor]:
    """Query, key and value in the layout that models give them: heads beside each other in memory."""
    return [
        torch.randn(batch, length, number, size).transpose(1, 2)
        for length, number in ((queries, heads), (queries + before, groups), (queries + before, groups))
    ]


def results(function: Any, layer: Layer, inputs: list[torch.Tensor], mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Output and gradients."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output, weights = function(layer, *inputs, mask, scaling=0.3)
    assert weights is None
    outer = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, inputs, outer)]


def causal(batch: int, queries: int, before: int) -> torch.Tensor:
    return torch.ones(queries, queries + before, dtype=torch.bool).tril(before).expand(batch, 1, -1, -1)


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    heads_per_key=st.integers(1, 3),
    queries=st.integers(1, 9),
    before=st.integers(0, 5),
    size=st.sampled_from([1, 4, 8]),
    masked=st.booleans(),
)
def test_output_and_gradients_are_pytorchs(
    batch: int, groups: int, heads_per_key: int, queries: int, before: int, size: int, masked: bool
) -> None:
    before = before if masked else 0  # without a mask, queries are all there is
    inputs = tensors(batch, groups * heads_per_key, groups, queries, before, size)
    mask = causal(batch, queries, before) if masked else None
    layer = Layer(heads_per_key)
    expected = results(sdpa_attention_forward, layer, inputs, mask)
    for got, wanted in zip(results(attention, layer, inputs, mask), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_each_row_of_a_batch_has_its_own_mask() -> None:
    """As packed examples have, of different lengths."""
    inputs = tensors(2, 4, 2, 6, 0, 8)
    mask = causal(2, 6, 0).clone()
    mask[0, :, 3:, :3] = False
    mask[1, :, 2:, :2] = False
    expected = results(sdpa_attention_forward, Layer(2), inputs, mask)
    for got, wanted in zip(results(attention, Layer(2), inputs, mask), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_it_is_as_exact_as_that_format_allows() -> None:
    inputs = tensors(2, 6, 2, 40, 20, 16)
    mask = causal(2, 40, 20)
    wanted = results(sdpa_attention_forward, Layer(3), [tensor.double() for tensor in inputs], mask)
    got = results(attention, Layer(3), [tensor.bfloat16() for tensor in inputs], mask)
    for have, want in zip(got, wanted, strict=True):
        assert (have.double() - want).norm() / want.norm() < 2 * torch.finfo(torch.bfloat16).eps


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
def test_what_is_not_plain_goes_to_pytorch(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    monkeypatch.setattr(fused_attention, "sdpa_attention_forward", lambda *args, **kwargs: ("pytorch", None))
    query, key, value = tensors(2, 4, 2, 6, 0, 8)
    arguments: dict[str, Any] = {"attention_mask": None} | change
    assert attention(Layer(2), query, key, value, **arguments)[0] == "pytorch"


def test_long_rows_go_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_attention, "sdpa_attention_forward", lambda *args, **kwargs: ("pytorch", None))
    monkeypatch.setattr(fused_attention, "_LONGEST", 5)
    query, key, value = tensors(2, 4, 2, 6, 0, 8)
    assert attention(Layer(2), query, key, value, None)[0] == "pytorch"


def tiny_model(implementation: str) -> Any:
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def test_a_model_answers_the_same_and_saves_nothing_of_it() -> None:
    model = tiny_model("sdpa")
    ids = torch.arange(20).view(2, 10)
    before, config = model(input_ids=ids).logits, model.config.to_json_string()
    assert fuse_attention(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    assert model.config.to_json_string() == config


def test_a_model_that_needs_another_attention_keeps_it() -> None:
    """Soft-capped scores, for one, are computed by `eager` alone."""
    model = tiny_model("eager")
    assert not fuse_attention(model)
    assert model.config._attn_implementation == "eager"
