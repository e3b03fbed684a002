"""Tests that gradient checkpointing is off on a GPU only if training fits in its memory with a margin."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.conftest import make_recipe
from tests.trainer.estimate.configs import cpu_device, even_workload, published
from trainer.estimate.checkpointing import SPARE, choose_checkpointing, with_checkpointing
from trainer.estimate.estimate import Estimate, estimate_recipe

ROWS, LENGTH = 4, 1024


def on_gpu(memory: float, **train: Any) -> Estimate:
    """Return the estimate of LoRA on Llama 3.1 8B, with batches of 4 x 1,024 tokens."""
    recipe = make_recipe(method="lora", train={"batch_size": ROWS, **train})
    device = replace(cpu_device(memory), cpu=False)
    return estimate_recipe(recipe, published("llama-3.1-8b"), even_workload(100, LENGTH, recipe), [device], 4096)


STORED = on_gpu(1e12, gradient_checkpointing=False).here.memory


@given(memory=st.floats(1e9, 3e11))
def test_checkpointing_is_enabled_when_free_memory_is_below_the_estimate_plus_margin(
    memory: float,
) -> None:
    assert choose_checkpointing(on_gpu(memory)).enabled is (memory < STORED * SPARE)


def test_lora_on_an_8b_model_needs_checkpointing_on_a_24_gb_gpu_but_not_on_a_141_gb_gpu() -> None:
    assert choose_checkpointing(on_gpu(24e9)).enabled
    assert not choose_checkpointing(on_gpu(141e9)).enabled


def test_checkpointing_reason_states_required_and_free_memory() -> None:
    reason = choose_checkpointing(on_gpu(24e9)).reason
    assert reason == f"without checkpointing, training needs up to {SPARE * STORED / 1e9:.1f} GB; 24.0 GB are free"


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("memory", [24e9, 1e12])
def test_recipe_overrides_the_automatic_checkpointing_choice(memory: float, asked: bool) -> None:
    chosen = choose_checkpointing(on_gpu(memory, gradient_checkpointing=asked))
    assert (chosen.enabled, chosen.reason) == (asked, "train.gradient_checkpointing")


def test_gradient_checkpointing_stays_off_on_a_cpu() -> None:
    recipe = make_recipe()
    shape, workload = published("llama-3.1-8b"), even_workload(100, LENGTH, recipe)
    assert not choose_checkpointing(estimate_recipe(recipe, shape, workload, [cpu_device(1e9)], 4096)).enabled


def test_weights_are_not_sharded_when_a_full_copy_fits_with_gradient_checkpointing() -> None:
    plain = on_gpu(24e9, gradient_accumulation=2)
    device = replace(plain.here.device, count=2)
    estimate = estimate_recipe(plain.recipe, plain.shape, plain.workload, [device], 4096)
    assert not estimate.here.sharded
    assert choose_checkpointing(estimate).enabled
    assert not with_checkpointing(estimate, True, 4096).here.sharded


def test_checkpointing_is_enabled_for_models_that_store_all_attention_scores_even_if_memory_is_ample() -> None:
    estimate = on_gpu(1e12)
    capped = replace(estimate, shape=replace(estimate.shape, stores_scores=True))
    assert choose_checkpointing(capped).enabled


def test_training_without_checkpointing_is_estimated_to_use_more_memory_and_less_time() -> None:
    on, off = (with_checkpointing(on_gpu(1e12), enabled, 4096).here for enabled in (True, False))
    assert (on.checkpointing, off.checkpointing) == (True, False)
    assert off.memory > on.memory
    assert off.seconds < on.seconds
