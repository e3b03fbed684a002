"""Tests that a run whose adapter starts with a part of the base's weights learns, resumes and merges."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.objective import Objective
from svc.engine.device import NumberType
from tests.builders.preferences import data_for
from tests.builders.resumed_training import assert_same, train_in, train_until
from tests.builders.trainings import CLOSE, train
from tests.trainer.conftest import losses_of, make_recipe
from tests.trainer.uninterrupted import UninterruptedRuns
from trainer.export.merge import merge_adapter
from trainer.model.peft_config import load_adapter
from trainer.recipe.recipe import Recipe
from trainer.training.summary import TrainingData

pytestmark = pytest.mark.slow

BFLOAT16, _, FLOAT32 = NumberType
IDS = torch.arange(40).reshape(2, 20)


def recipe(start: str = "pissa", **sections: Any) -> Recipe:
    steps = {"batch_size": 4, "epochs": 4, "learning_rate": 5e-3}
    saved = {"every_steps": 1}
    return make_recipe(**{"adapter": {"rank": 4, "init": start}, "train": steps, "checkpoints": saved} | sections)


@pytest.fixture
def data(examples: list[ChatExample]) -> TrainingData:
    return TrainingData(examples, examples[:5])


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "gaussian"])
def test_merged_model_matches_the_original_base_plus_adapter(
    start: str, tiny_base: Path, uninterrupted: UninterruptedRuns, tmp_path: Path
) -> None:
    run = uninterrupted.run(recipe(start))
    assert losses_of(run.summary)[-1] < losses_of(run.summary)[0] - 0.2
    assert merge_adapter(tiny_base, run.folder / "trained", tmp_path).modules == 2 * 7
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        untrained = base(IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(IDS).logits
        beside = load_adapter(base, run.folder / "trained")(IDS).logits
    assert (merged - beside).abs().max() < 0.1 * (merged - untrained).abs().max()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4"])
def test_killed_and_resumed_pissa_run_ends_with_the_same_weights(
    start: str,
    tiny_base: Path,
    data: TrainingData,
    uninterrupted: UninterruptedRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = uninterrupted.run(recipe(start))
    train_until(tiny_base, data, recipe(start), tmp_path, 5, monkeypatch)
    assert_same(train_in(BFLOAT16, tiny_base, data, recipe(start), tmp_path), tmp_path, whole)


@pytest.mark.matrix
@pytest.mark.parametrize("sharded", [False, True])
def test_pissa_training_on_two_devices_matches_one_device(
    sharded: bool, tiny_base: Path, data: TrainingData, uninterrupted: UninterruptedRuns, tmp_path: Path
) -> None:
    alone = uninterrupted.run(recipe(), FLOAT32)
    both = train(tiny_base, data, recipe(), tmp_path, 2, sharded=sharded)
    assert losses_of(both) == pytest.approx(losses_of(alone.summary), abs=10 * CLOSE)
    theirs = load_file(alone.folder / "trained" / "adapter_model.safetensors")
    for name, weight in load_file(tmp_path / "trained" / "adapter_model.safetensors").items():
        assert torch.allclose(weight, theirs[name], atol=1e-3), name


def test_preference_training_with_pissa_uses_the_original_base_as_reference(tiny_base: Path, tmp_path: Path) -> None:
    judged = recipe(objective=Objective.DPO, train={"batch_size": 4, "steps": 1})
    summary = train_in(FLOAT32, tiny_base, data_for(Objective.DPO), judged, tmp_path)
    assert losses_of(summary)[0] == pytest.approx(math.log(2), abs=1e-4)
