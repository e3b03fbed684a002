"""Tests that AdaLoRA's schedule fits runs of any length, even if a float16 optimizer skips its first steps."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments, set_seed

from tests.trainer.conftest import make_recipe
from trainer.model.adalora import RankAllocation
from trainer.model.peft_config import adapter_config

RANK, INITIAL_RANK, LAYERS = 2, 3, 4
SHAPE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def kept_ranks(model: PeftModel) -> int:
    """Return the total number of ranks kept over all layers."""
    values = [weight for name, weight in model.named_parameters() if ".lora_E." in name]
    assert len(values) == LAYERS
    return sum(int(value.count_nonzero()) for value in values)


def run(steps: int, *, skipped: int = 0) -> PeftModel:
    """Return a model after steps with random gradients, the first `skipped` of which the optimizer skips."""
    set_seed(0)
    recipe = make_recipe(method="adalora", adapter={"rank": RANK})
    config = adapter_config(recipe, ["q_proj", "v_proj"], steps)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), config)
    allocation, state = RankAllocation(model), TrainerState()
    for step in range(steps):
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.grad = torch.randn_like(weight)
                if ".lora_E." in name:
                    weight.data.add_(1e-3)
        state.global_step = step
        optimizer = SimpleNamespace(step_was_skipped=step < skipped)
        allocation.on_optimizer_step(TrainingArguments(use_cpu=True), state, TrainerControl(), optimizer=optimizer)
    return model


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 6, 7, 10, 25])
def test_adalora_reaches_the_requested_rank_when_the_run_has_at_least_two_steps(steps: int) -> None:
    assert kept_ranks(run(steps)) == LAYERS * RANK


def test_adalora_keeps_all_ranks_when_the_run_has_only_one_step() -> None:
    assert kept_ranks(run(1)) == LAYERS * INITIAL_RANK


@pytest.mark.parametrize(("steps", "skipped"), [(1, 1), (2, 2), (3, 1), (10, 10)])
def test_adalora_keeps_all_ranks_when_all_steps_before_rank_allocation_are_skipped(steps: int, skipped: int) -> None:
    assert kept_ranks(run(steps, skipped=skipped)) == LAYERS * INITIAL_RANK


def test_adalora_reaches_the_requested_rank_when_the_first_step_is_skipped() -> None:
    assert kept_ranks(run(10, skipped=1)) == LAYERS * RANK
