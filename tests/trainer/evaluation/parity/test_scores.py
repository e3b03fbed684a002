"""Tests that in bf16, even an adapter's small outputs affect the sum, as they affect merged weights."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model

from trainer.evaluation.parity.report import choose_device, sum_in_float32

WIDTH = 256
SHARE_OF_A_STEP = 1 / 16
"""Adapter output in units of the spacing of bf16 numbers, which is 1/256 to 1/128 of a number."""
KINDS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=4, target_modules=["0"], init_lora_weights=False),
    "dora": lambda: LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, use_dora=True),
    "vera": lambda: VeraConfig(r=4, target_modules=["0"], init_weights=False),
}


def fine_adapter(kind: str, inputs: torch.Tensor) -> tuple[PeftModel, torch.Tensor, torch.Tensor]:
    """Return a bf16 layer with an adapter, its exact output without it, and the adapter's exact output."""
    plain = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, bias=False))
    plain[0].weight.data = plain[0].weight.data.to(torch.bfloat16).float()
    without = plain(inputs)
    model = get_peft_model(plain, KINDS[kind]())
    for _ in range(2):
        added = model(inputs) - without
        wanted = without.abs().mean() / 256 * SHARE_OF_A_STEP
        for name, weight in model.named_parameters():
            if "lora_B" in name or "lambda_b" in name:
                weight.mul_(wanted / added.abs().mean())
    layer = model.base_model.model[0].get_base_layer()
    layer.weight.data = layer.weight.data.to(torch.bfloat16)
    return model, without, added


def arrived(model: PeftModel, inputs: torch.Tensor, without: torch.Tensor, added: torch.Tensor) -> float:
    """Return the share of the adapter's output that is retained in the sum."""
    output = model(inputs)
    assert output.dtype is torch.bfloat16
    change = output.float() - without.to(torch.bfloat16).float()
    return float((change * added).sum() / (added * added).sum())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_update_below_bf16_precision_affects_the_output_when_summed_in_float32(kind: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2048, WIDTH).to(torch.bfloat16)
    model, without, added = fine_adapter(kind, inputs.float())
    sum_in_float32(model)
    assert arrived(model, inputs, without, added) == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("kind", ["lora", "vera"])
@torch.no_grad()
def test_update_below_bf16_precision_is_lost_when_peft_adds_it_in_bf16(kind: str) -> None:
    """If this fails, PEFT has fixed its rounding, and `sum_in_float32` can be deleted."""
    torch.manual_seed(0)
    inputs = torch.randn(2048, WIDTH).to(torch.bfloat16)
    model, without, added = fine_adapter(kind, inputs.float())
    assert arrived(model, inputs, without, added) < 0.3


def test_layer_that_sums_in_float32_is_freed_without_garbage_collection() -> None:
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH)).bfloat16(), KINDS["lora"]())
    sum_in_float32(model)
    layer, base = model.base_model.model[0], weakref.ref(model.base_model.model[0].get_base_layer())
    del model
    gc.collect()  # PEFT's own cycles, above the layer
    gc.disable()
    try:
        del layer
        assert base() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("size", "free", "device"),
    [
        pytest.param(16e9, None, "cpu", id="no GPU"),
        pytest.param(16e9, 24e9, "cuda", id="8B in bf16 on 24 GB"),
        pytest.param(16e9, 16e9, "cpu", id="8B in bf16 on 16 GB"),
        pytest.param(16e9, 17e9, "cpu", id="weights alone fit"),
        pytest.param(32e9, 24e9, "cpu", id="8B in float32 on 24 GB"),
        pytest.param(3e8, 2e9, "cpu", id="no room for logits"),
        pytest.param(3e8, 4e9, "cuda", id="a small model on a small GPU"),
    ],
)
def test_model_is_scored_on_the_gpu_when_one_copy_fits(size: float, free: float | None, device: str) -> None:
    assert choose_device(int(size), None if free is None else int(free)) == device
