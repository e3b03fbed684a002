"""Tests that a fused LoRA layer equals PEFT's, which is used for unsupported cases."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed

from trainer.training.cpu.lora_autograd import fuse_lora


class OneLayer(torch.nn.Module):
    """The smallest model that PEFT accepts, with a single layer."""

    def __init__(self, width: int, height: int, bias: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, height, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x)
        return result


def adapted(width: int = 8, height: int = 12, bias: bool = True, **config: Any) -> PeftModel:
    set_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **config}
    return get_peft_model(OneLayer(width, height, bias), LoraConfig(target_modules=["layer"], **settings))


def results(model: PeftModel, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the model's output and all its gradients."""
    x = x.clone().requires_grad_()
    y = model(x)
    learnt = [weight for weight in model.parameters() if weight.requires_grad]
    return [y.detach(), *torch.autograd.grad((y.float() ** 2).sum(), [x, *learnt])]


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_fused_lora_output_and_gradients_match_peft(
    rows: int, length: int, width: int, height: int, bias: bool
) -> None:
    model = adapted(width, height, bias)
    x = torch.randn(rows, length, width)
    expected = results(model, x)
    assert fuse_lora(model) == 1
    for got, wanted in zip(results(model, x), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(24, 40), (40, 24), (32, 32), (40, 600), (600, 40)])
def test_fused_lora_gradients_match_the_analytic_gradients_for_many_rows(width: int, height: int) -> None:
    """There are more rows than some of these widths, so the update is added to the weight in one pass or both."""
    model = adapted(width, height)
    layer = model.base_model.model.layer
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(4, 50, width, requires_grad=True)
    learnt = [x, low, high]
    by_formula = layer.base_layer(x) + layer.scaling["default"] * (x @ low.T) @ high.T
    outer = torch.randn_like(by_formula)
    expected = [by_formula.detach(), *torch.autograd.grad(by_formula, learnt, outer)]
    assert fuse_lora(model) == 1
    y = model(x)
    for got, wanted in zip([y.detach(), *torch.autograd.grad(y, learnt, outer)], expected, strict=True):
        assert relative_error(got, wanted) < 1e-5


@pytest.mark.slow
def test_fused_lora_weights_match_peft_after_many_steps() -> None:
    x, wanted = torch.randn(2, 64, 8), torch.randn(2, 64, 12)

    def trained(fused: bool) -> tuple[float, torch.Tensor]:
        model = adapted()
        if fused:
            fuse_lora(model)
        learnt = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(learnt, lr=1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), wanted)
            loss.backward()
            optimizer.step()
        return loss.item(), torch.cat([weight.detach().flatten() for weight in learnt])

    (loss, weights), (pefts_loss, pefts_weights) = trained(fused=True), trained(fused=False)
    assert loss == pytest.approx(pefts_loss, rel=1e-5)
    assert relative_error(weights, pefts_weights) < 1e-4


def test_fused_lora_preserves_updates_smaller_than_the_bf16_weight_spacing() -> None:
    """1 and 1.001 are the same number in bf16. The outputs, which are 0 without the update, show a loss."""
    model = adapted(2, 1, bias=False, r=1, lora_alpha=1)
    layer = model.base_model.model.layer
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_A["default"].weight.copy_(torch.tensor([[1.0, 1.0]]))
        layer.lora_B["default"].weight.fill_(1e-3)
    layer.base_layer.bfloat16()
    fuse_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.ones(1, 50, 2, dtype=torch.bfloat16))
    torch.testing.assert_close(y.float(), torch.full((1, 50, 1), 2e-3), rtol=1e-2, atol=0)


def test_fused_lora_neither_changes_nor_copies_the_base_weight() -> None:
    model = adapted(8, 12)
    weight = model.base_model.model.layer.base_layer.weight
    before, stored = weight.clone(), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        stored.append(tensor)
        return tensor

    fuse_lora(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(torch.randn(2, 50, 8))
    y.sum().backward()
    assert torch.equal(weight, before)
    same_shape = [tensor for tensor in stored if tensor.shape == weight.shape]
    assert [tensor.data_ptr() for tensor in same_shape] == [weight.data_ptr()]


def test_fused_lora_bf16_error_is_no_larger_than_with_peft() -> None:
    model = adapted(64, 64)
    x = torch.randn(4, 16, 64).bfloat16()
    model.base_model.model.layer.base_layer.bfloat16()
    exact = [part.float() for part in results(adapted_like(model), x.float())]
    with torch.autocast("cpu", torch.bfloat16):
        peft = results(model, x)
        fuse_lora(model)
        fused = results(model, x)

    def error(parts: list[torch.Tensor]) -> float:
        return sum(float((part.float() - true).norm() / true.norm()) for part, true in zip(parts, exact, strict=True))

    assert error(fused) < 1.1 * error(peft)


def adapted_like(model: PeftModel) -> PeftModel:
    """Return a float32 model with the same weights."""
    other = adapted(64, 64)
    other.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    return other


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ({"use_dora": True}, None),
        ({"lora_bias": True}, None),
        ({}, lambda model: model.disable_adapter_layers()),
        ({}, lambda model: model.merge_adapter()),
    ],
    ids=["DoRA", "a bias in the adapter", "switched off", "merged"],
)
def test_fused_lora_falls_back_to_peft_for_layers_that_do_not_use_plain_lora(
    config: dict[str, Any], change: Callable[[PeftModel], None] | None
) -> None:
    plain, fused = adapted(**config), adapted(**config)
    fuse_lora(fused)
    for model in (plain, fused):
        if change:
            change(model)
    x = torch.randn(2, 3, 8)
    assert torch.equal(plain(x), fused(x))


def test_fused_lora_applies_dropout_only_during_training() -> None:
    model = adapted(lora_dropout=0.5).train()
    fuse_lora(model)
    x = torch.randn(2, 3, 8)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_fusing_lora_layers_does_not_change_weight_names() -> None:
    model = adapted()
    names = list(model.state_dict())
    fuse_lora(model)
    assert list(model.state_dict()) == names
