"""Tests optimizers: transformers' names, rejection on this machine, and 8-bit moments when resuming."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves
from transformers.training_args import OptimizerNames

from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType
from svc.errors import RecipeError
from tests.builders.preferences import data_for
from tests.builders.resumed_training import train_in, train_until
from tests.builders.trainings import CLOSE, train
from tests.trainer.conftest import losses_of, make_recipe
from trainer.model.acceleration import choose_acceleration, machine_facts
from trainer.recipe.recipe import Recipe
from trainer.recipe.train import Optimizer
from trainer.training import optimizer as optimizer_module
from trainer.training.arguments import training_arguments
from trainer.training.optimizer import check_optimizer, choose_optimizer
from trainer.training.summary import TrainingData


@pytest.mark.parametrize("optimizer", Optimizer)
def test_all_optimizer_names_are_known_to_transformers(optimizer: Optimizer) -> None:
    name = OptimizerNames(choose_optimizer(optimizer, scaled=False))
    assert ("8bit" in name) is optimizer.is_8bit
    assert name.startswith("paged") is optimizer.is_paged


def test_fused_adamw_is_not_used_when_the_loss_is_scaled() -> None:
    assert choose_optimizer(Optimizer.ADAMW, scaled=True) == "adamw_torch"


@pytest.mark.parametrize("optimizer", ["paged-adamw", "paged-adamw-8bit"])
def test_paged_optimizer_is_rejected_for_cpu_training(optimizer: str) -> None:
    with pytest.raises(RecipeError, match="training runs on the CPU") as caught:
        check_optimizer(Optimizer(optimizer), cuda=False)
    assert caught.value.todo == f"set train.optimizer to {optimizer.removeprefix('paged-')}"


@pytest.mark.parametrize("optimizer", Optimizer)
def test_every_optimizer_is_accepted_for_gpu_training(optimizer: Optimizer) -> None:
    check_optimizer(optimizer, cuda=True)


def test_8_bit_optimizer_is_rejected_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_module, "find_spec", lambda name: None)
    check_optimizer(Optimizer.ADAMW, cuda=False)
    with pytest.raises(RecipeError, match="needs bitsandbytes"):
        check_optimizer(Optimizer.ADAMW_8BIT, cuda=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_training_with_an_optimizer_unsupported_on_this_machine_is_rejected(tmp_path: Path) -> None:
    recipe = make_recipe(train={"optimizer": "paged-adamw"})
    with pytest.raises(RecipeError, match="runs on the CPU"):
        training_arguments(recipe, 1e-3, tmp_path, choose_acceleration(machine_facts()), 10, NumberType.FLOAT32)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_interrupted_training_with_8_bit_moments_ends_with_the_same_weights(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights are trained, because no parameter in an adapter of the tiny model has 4,096 weights."""
    train = {"batch_size": 3, "steps": 6, "learning_rate": 1e-3, "optimizer": "adamw-8bit"}
    recipe = make_recipe(method="full", checkpoints={"every_steps": 1}, stopping={"curve": False}, train=train)
    data, weights = TrainingData(examples), []
    train_until(tiny_base, data, recipe, tmp_path / "resumed", 4, monkeypatch)
    for name in ("whole", "resumed"):
        summary = train_in(NumberType.BFLOAT16, tiny_base, data, recipe, tmp_path / name)
        moments = torch.load(max((tmp_path / name / "checkpoints").rglob("optimizer.pt")), weights_only=False)["state"]
        assert torch.uint8 in {getattr(moment, "dtype", None) for moment in tree_leaves(moments)}
        assert losses_of(summary)[-1] < losses_of(summary)[0]
        weights.append(load_file(tmp_path / name / "trained" / "model.safetensors"))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def lora_plus(ratio: float | None = 8, **sections: Any) -> Recipe:
    train = {"batch_size": 4, "epochs": 2, "learning_rate": 2e-3, "lora_plus_ratio": ratio} | sections.pop("train", {})
    return make_recipe(**{"adapter": {"rank": 4}, "checkpoints": {"every_steps": 1}, "train": train} | sections)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
def test_lora_plus_lowers_the_loss_more_than_a_single_learning_rate_and_resumes_with_the_same_weights(
    method: str, tiny_base: Path, examples: list[ChatExample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, weights, recipe = TrainingData(examples), [], lora_plus(method=method)
    train_until(tiny_base, data, recipe, tmp_path / "resumed", 3, monkeypatch, NumberType.FLOAT32)
    for name in ("whole", "resumed"):
        summary = train_in(NumberType.FLOAT32, tiny_base, data, recipe, tmp_path / name)
        weights.append(load_file(tmp_path / name / "trained" / "adapter_model.safetensors"))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    plain = train_in(NumberType.FLOAT32, tiny_base, data, lora_plus(None, method=method), tmp_path / "plain")
    assert losses_of(summary)[-1] < losses_of(plain)[-1] - 0.1


@pytest.mark.slow
def test_lora_plus_can_be_combined_with_8_bit_moments_and_preference_training(tiny_base: Path, tmp_path: Path) -> None:
    train = {"optimizer": "adamw-8bit", "steps": 2}
    recipe = lora_plus(objective="dpo", adapter={"rank": 64}, train=train)
    train_in(NumberType.FLOAT32, tiny_base, data_for(recipe.objective), recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("sharded", [False, True])
def test_lora_plus_on_two_devices_matches_one_device(
    sharded: bool, tiny_base: Path, examples: list[ChatExample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = [
        train(
            tiny_base,
            TrainingData(examples),
            lora_plus(),
            tmp_path / str(devices),
            devices,
            sharded=sharded and devices > 1,
        )
        for devices in (1, 2)
    ]
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]), abs=10 * CLOSE)
