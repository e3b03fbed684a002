"""Tests that two processes over gloo learn a preference as one device does, with copies and with sharded weights."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from svc.dataset.schema.objective import Objective
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from svc.engine.device import NumberType
from svc.errors import InterruptedRunError
from tests.builders.preferences import LABELED, PAIRS, recipe_of
from tests.builders.trainings import CLOSE, CLOSE_WEIGHTS, at_checkpoint, difference, heldout_of, weights
from tests.trainer.conftest import losses_of, make_example
from tests.trainer.without_clock import without_clock
from trainer.recipe.adapter import Method
from trainer.recipe.recipe import Recipe
from trainer.training.parallel.device_processes import DeviceProcesses
from trainer.training.parallel.devices import TrainingDevice
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData, TrainingSummary

pytestmark = pytest.mark.matrix

DPO, ORPO, KTO = Objective.DPO, Objective.ORPO, Objective.KTO


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each process one thread, as this one has: results depend on the number of threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def data_for(objective: Objective) -> TrainingData:
    """Return thirteen comparisons, so that the last step of an epoch has only one, and five that are held out."""
    last = PreferencePair(make_example("a number", "black"), make_example("a number", "red"))
    pairs: list[Any] = [*PAIRS, last]
    answers: list[Any] = [*LABELED, LabeledAnswer(last.chosen, desirable=True)]
    judged = answers if objective is KTO else pairs
    return TrainingData((), preferences=judged, heldout_preferences=judged[:5])


def recipe(objective: Objective, method: Method = Method.LORA, **train: Any) -> Recipe:
    rate = 1e-4 if method is Method.FULL else 1e-3
    section = {"batch_size": 4, "epochs": 2, "learning_rate": rate} | train
    return recipe_of(objective, method, train=section, stopping={"every_steps": 3})


def train(recipe: Recipe, base: Path, folder: Path, processes: int, *, sharded: bool = False) -> TrainingSummary:
    devices = DeviceProcesses((TrainingDevice("the CPU"),) * processes) if processes > 1 else None
    data, out, checkpoints = data_for(recipe.objective), folder / "trained", folder / "checkpoints"
    number_type = NumberType.FLOAT32
    return train_model(
        base, data, recipe, out, checkpoints, number_type=number_type, processes=devices, sharded=sharded
    )


@pytest.mark.parametrize(
    ("objective", "method", "settings", "sharded"),
    [
        (KTO, Method.LORA, {}, True),
        (DPO, Method.LORA, {}, False),
        (ORPO, Method.LORA, {}, False),
        (KTO, Method.LORA, {}, False),
        (DPO, Method.LORA, {}, True),
        (ORPO, Method.LORA, {}, True),
        (DPO, Method.FULL, {}, True),
        (DPO, Method.QLORA, {}, True),
        (ORPO, Method.LORA, {"batch_size": 2, "gradient_accumulation": 2}, True),
        (DPO, Method.LORA, {"gradient_checkpointing": True}, True),
    ],
    ids=str,
)
def test_preference_training_on_two_devices_matches_one_device(
    objective: Objective, method: Method, settings: dict[str, Any], sharded: bool, tiny_base: Path, tmp_path: Path
) -> None:
    changed = recipe(objective, method, **settings)
    one = train(changed, tiny_base, tmp_path / "1", 1)
    two = train(changed, tiny_base, tmp_path / "2", 2, sharded=sharded)
    assert losses_of(two) == pytest.approx(losses_of(one), abs=CLOSE)
    assert heldout_of(two) == pytest.approx(heldout_of(one), abs=CLOSE)
    stored_in_bf16 = 2**-7
    assert difference(tmp_path / "1", tmp_path / "2") < (stored_in_bf16 if method is Method.FULL else CLOSE_WEIGHTS)
    assert (two.steps, two.devices) == (one.steps, 2)


@pytest.mark.parametrize(("objective", "sharded"), [(DPO, False), (KTO, True)])
def test_interrupted_preference_run_on_two_devices_resumes_with_a_bitwise_identical_result(
    objective: Objective, sharded: bool, tiny_base: Path, tmp_path: Path
) -> None:
    changed = recipe(objective, epochs=5)
    whole = train(changed, tiny_base, tmp_path / "a", 2, sharded=sharded)
    thread = at_checkpoint(tmp_path / "b", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InterruptedRunError, match=r"^stopped by SIGTERM after step \d+ of 20"):
        train(changed, tiny_base, tmp_path / "b", 2, sharded=sharded)
    thread.join()
    resumed = train(changed, tiny_base, tmp_path / "b", 2, sharded=sharded)
    assert without_clock(resumed) == without_clock(whole)
    assert weights(tmp_path / "b") == weights(tmp_path / "a")
