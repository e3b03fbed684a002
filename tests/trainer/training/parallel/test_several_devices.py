"""Tests that two processes over gloo train as one device does, and that they stop, die and resume together."""

import json
import os
import signal
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import DistributedType
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType
from svc.errors import InterruptedRunError, TrainingError
from tests.builders.mixtures import SHAPE
from tests.builders.trainings import CLOSE, CLOSE_WEIGHTS, at_checkpoint, difference, heldout_of, train, weights
from tests.trainer.conftest import losses_of, make_example, make_recipe, make_tokenizer
from tests.trainer.without_clock import without_clock
from trainer.recipe.adapter import Method
from trainer.recipe.recipe import Recipe
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.parallel.device_group import DeviceGroup, devices_of
from trainer.training.parallel.device_processes import DeviceProcesses
from trainer.training.parallel.devices import TrainingDevice
from trainer.training.parallel.sharding import check_sharded
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData

pytestmark = pytest.mark.slow

STEPS = 12
ENDS_S = 10.0
"""Seconds within which all processes must have ended after one died, on a busy machine."""


def recipe(method: Method = Method.LORA, **sections: Any) -> Recipe:
    rate = 1e-3 if method is Method.FULL else 1e-2
    train = {"batch_size": 4, "epochs": 3, "learning_rate": rate} | sections.pop("train", {})
    adapter: dict[str, Any] = {"rank": 4} | sections.pop("adapter", {})
    if method is Method.FULL:
        adapter = {}
    return make_recipe(**{"method": method.value, "adapter": adapter, "train": train} | sections)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each process one thread, as this one has: results depend on the number of threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def data(examples: list[ChatExample]) -> TrainingData:
    """Return thirteen examples, so that the last step of an epoch has only one, and five that are held out."""
    return TrainingData([*examples, make_example("a number", "black")], examples[:5])


def config_of(folder: Path) -> dict[str, Any]:
    """Return the config of a trained model or adapter, whose target modules have no order."""
    (path,) = (path for path in (folder / "trained").iterdir() if path.name in ("config.json", "adapter_config.json"))
    config: dict[str, Any] = json.loads(path.read_bytes())
    return config | {"target_modules": sorted(config.get("target_modules", ()))}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        pytest.param(Method.LORA, {}, marks=pytest.mark.matrix),
        pytest.param(Method.LORA, {"batch_size": 2, "gradient_accumulation": 2}, marks=pytest.mark.matrix),
        pytest.param(Method.LORA, {"batch_size": 2, "gradient_accumulation": 3}, marks=pytest.mark.matrix),
        pytest.param(Method.LORA, {"packing": True, "max_length": 150}, marks=pytest.mark.matrix),
        pytest.param(Method.LORA, {"gradient_checkpointing": True}, marks=pytest.mark.matrix),
        pytest.param(Method.DORA, {}, marks=pytest.mark.matrix),
        pytest.param(Method.ADALORA, {"gradient_accumulation": 2}, marks=pytest.mark.matrix),
        pytest.param(Method.QLORA, {}, marks=pytest.mark.matrix),
        pytest.param(Method.FULL, {}, marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_training_on_two_devices_gives_the_same_losses_and_weights_as_on_one_device(
    method: Method, settings: dict[str, Any], tiny_base: Path, data: TrainingData, tmp_path: Path
) -> None:
    changed = recipe(method, train=settings, stopping={"every_steps": 3})
    one, two = (train(tiny_base, data, changed, tmp_path / str(count), count) for count in (1, 2))
    assert losses_of(two) == pytest.approx(losses_of(one), abs=CLOSE)
    assert heldout_of(two) == pytest.approx(heldout_of(one), abs=CLOSE)
    stored_in_bf16 = 2**-7  # two units in the last place of the norms' weights, which are near 1
    assert difference(tmp_path / "1", tmp_path / "2") < (stored_in_bf16 if method is Method.FULL else CLOSE_WEIGHTS)
    assert (two.steps, two.devices) == (one.steps, 2)
    assert two.tokens == pytest.approx(one.tokens, abs=2 * 3)  # in each epoch, a filler of two tokens


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        pytest.param(Method.LORA, {}, marks=pytest.mark.matrix),
        pytest.param(Method.LORA, {"batch_size": 2, "gradient_accumulation": 4}, marks=pytest.mark.matrix),
        pytest.param(Method.LORA, {"packing": True, "max_length": 150}, marks=pytest.mark.matrix),
        pytest.param(Method.DORA, {"gradient_checkpointing": True}, marks=pytest.mark.matrix),
        (Method.FULL, {"max_grad_norm": 0.05}),
        pytest.param(Method.FULL, {"gradient_checkpointing": True}, marks=pytest.mark.matrix),
        pytest.param(Method.QLORA, {}, marks=pytest.mark.matrix),
        pytest.param(Method.QLORA, {"gradient_checkpointing": True}, marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_sharded_training_on_two_devices_matches_the_losses_and_saved_weights_of_one_device(
    method: Method, settings: dict[str, Any], tiny_base: Path, data: TrainingData, tmp_path: Path
) -> None:
    """The second device has none of the last held-out examples, of which there are five."""
    changed = recipe(method, train=settings, stopping={"every_steps": 3})
    one = train(tiny_base, data, changed, tmp_path / "1", 1)
    two = train(tiny_base, data, changed, tmp_path / "2", 2, sharded=True)
    assert losses_of(two) == pytest.approx(losses_of(one), abs=CLOSE)
    assert heldout_of(two) == pytest.approx(heldout_of(one), abs=CLOSE)
    stored_in_bf16 = 2**-7
    assert difference(tmp_path / "1", tmp_path / "2") < (stored_in_bf16 if method is Method.FULL else CLOSE_WEIGHTS)
    assert config_of(tmp_path / "1") == config_of(tmp_path / "2")


@pytest.mark.matrix
def test_dora_training_with_sharded_nf4_weights_gives_the_same_result_on_two_devices_as_on_one(
    tiny_base: Path, data: TrainingData, tmp_path: Path
) -> None:
    """DoRA dequantizes the gathered weights for their norms."""
    changed = recipe(Method.DORA, quantization="nf4")
    one = train(tiny_base, data, changed, tmp_path / "1", 1)
    two = train(tiny_base, data, changed, tmp_path / "2", 2, sharded=True)
    assert losses_of(two) == pytest.approx(losses_of(one), abs=CLOSE)
    assert difference(tmp_path / "1", tmp_path / "2") < CLOSE_WEIGHTS


@pytest.mark.matrix
@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA, Method.FULL])
def test_sharded_bfloat16_training_on_two_devices_has_nearly_the_same_losses_as_on_one_device(
    method: Method, tiny_base: Path, data: TrainingData, tmp_path: Path
) -> None:
    one = train(tiny_base, data, recipe(method), tmp_path / "1", 1, NumberType.BFLOAT16)
    two = train(tiny_base, data, recipe(method), tmp_path / "2", 2, NumberType.BFLOAT16, sharded=True)
    assert losses_of(two) == pytest.approx(losses_of(one), abs=0.02)


@pytest.mark.matrix
def test_mixture_of_experts_has_nearly_the_same_losses_on_two_devices_as_on_one(
    data: TrainingData, tmp_path: Path
) -> None:
    """The balancing loss is a mean over batches. TRL computes both losses, as for all models on a GPU."""
    set_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, num_experts=4)).bfloat16().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    one, two = (train(tmp_path / "base", data, recipe(), tmp_path / str(count), count) for count in (1, 2))
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-3)


@pytest.mark.matrix
def test_losses_and_checkpoints_are_reported_once_when_training_on_two_devices(
    tiny_base: Path, data: TrainingData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reported: list[int] = []
    announced: list[Path] = []
    changed = recipe(checkpoints={"every_steps": 5}, stopping={"curve": False})
    train(
        tiny_base,
        data,
        changed,
        tmp_path,
        2,
        report=lambda step, figures: reported.append(step),
        on_checkpoint=announced.append,
    )
    assert reported == list(range(1, STEPS + 1))
    folder = CheckpointFolder(tmp_path / "checkpoints", 2)
    assert announced == [folder.at(5), folder.at(10)]
    assert devices_of(folder.at(10)) == 2
    assert capfd.readouterr().err.count(f"Training: step {STEPS}/{STEPS}") == 1


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("method", "sharded"),
    [(Method.LORA, False), *((method, True) for method in (Method.LORA, Method.QLORA, Method.DORA, Method.FULL))],
)
def test_interrupted_run_on_two_devices_resumes_with_a_bitwise_identical_result(
    method: Method, sharded: bool, tiny_base: Path, data: TrainingData, tmp_path: Path
) -> None:
    """The run is stopped by a signal, and then killed; dropout needs the random numbers of each device."""
    changed = recipe(
        method,
        adapter={"dropout": 0.2},
        train={"epochs": 5, "batch_size": 2, "gradient_accumulation": 2},
        checkpoints={"every_steps": 1},
    )
    options: dict[str, Any] = {"number_type": NumberType.BFLOAT16, "sharded": sharded}
    whole = train(tiny_base, data, changed, tmp_path / "a", 2, **options)
    thread = at_checkpoint(tmp_path / "b", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InterruptedRunError, match=r"^stopped by SIGTERM after step \d+ of 20"):
        train(tiny_base, data, changed, tmp_path / "b", 2, **options)
    thread.join()
    assert active_children() == []
    thread = at_checkpoint(tmp_path / "b", 10, lambda: os.kill(rank(1), signal.SIGKILL))
    with pytest.raises(TrainingError, match="rank 1 of 2 on the CPU was killed by SIGKILL"):
        train(tiny_base, data, changed, tmp_path / "b", 2, **options)
    thread.join()
    resumed = train(tiny_base, data, changed, tmp_path / "b", 2, **options)
    assert without_clock(resumed) == without_clock(whole)
    assert weights(tmp_path / "b") == weights(tmp_path / "a")


def rank(number: int) -> int:
    """Return the process id of a rank."""
    (process,) = (child for child in active_children() if child.name == f"rank {number}")
    assert process.pid
    return process.pid


@pytest.mark.matrix
@pytest.mark.parametrize("sharded", [False, True])
def test_remaining_processes_exit_within_seconds_when_a_training_process_is_killed(
    sharded: bool, tiny_base: Path, data: TrainingData, tmp_path: Path
) -> None:
    killed: list[float] = []

    def kill() -> None:
        killed.append(time.monotonic())
        os.kill(rank(0), signal.SIGKILL)

    changed = recipe(train={"epochs": 100}, checkpoints={"every_steps": 1})
    thread = at_checkpoint(tmp_path, 2, kill)
    with pytest.raises(TrainingError, match="rank 0 of 2 on the CPU was killed by SIGKILL; the other processes were"):
        train(tiny_base, data, changed, tmp_path, 2, sharded=sharded)
    assert time.monotonic() - killed[0] < ENDS_S
    thread.join()
    assert active_children() == []


@pytest.mark.matrix
@pytest.mark.parametrize(("begun", "resumed_on"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("sharded", [False, True])
def test_resuming_on_a_different_number_of_devices_barely_changes_the_results_and_prints_a_notice(
    begun: int,
    resumed_on: int,
    sharded: bool,
    tiny_base: Path,
    data: TrainingData,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    changed = recipe(train={"epochs": 10}, checkpoints={"every_steps": 1})
    whole = train(tiny_base, data, changed, tmp_path / "a", 1)
    thread = at_checkpoint(tmp_path / "b", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InterruptedRunError):
        train(tiny_base, data, changed, tmp_path / "b", begun, sharded=sharded)
    thread.join()
    assert "converted" not in capfd.readouterr().err
    resumed = train(tiny_base, data, changed, tmp_path / "b", resumed_on, sharded=sharded)
    assert f"from {begun} to {resumed_on} devices" in " ".join(capfd.readouterr().err.split())
    assert losses_of(resumed) == pytest.approx(losses_of(whole), abs=CLOSE)
    assert difference(tmp_path / "a", tmp_path / "b") < CLOSE_WEIGHTS


@pytest.mark.matrix
def test_training_in_a_separate_process_gives_a_bitwise_identical_result(
    tiny_base: Path, data: TrainingData, tmp_path: Path
) -> None:
    changed = recipe(adapter={"dropout": 0.2})
    train(tiny_base, data, changed, tmp_path / "a", 1)
    out, checkpoints = tmp_path / "b" / "trained", tmp_path / "b" / "checkpoints"
    alone = DeviceProcesses((TrainingDevice("GPU 1"),))
    train_model(tiny_base, data, changed, out, checkpoints, number_type=NumberType.FLOAT32, processes=alone)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.matrix
@pytest.mark.parametrize("sharded", [False, True])
def test_divergence_on_all_devices_is_reported_as_one_error(
    sharded: bool, tiny_base: Path, data: TrainingData, tmp_path: Path
) -> None:
    changed = recipe(train={"learning_rate": 1e30, "max_grad_norm": 1e30})
    with pytest.raises(TrainingError, match=r"(the loss is|gradient norm|non-finite)") as caught:
        train(tiny_base, data, changed, tmp_path, 2, sharded=sharded)
    assert "lower train.learning_rate" in caught.value.todo


class _SingleProcess:
    """An accelerator that has silently ignored all other processes."""

    distributed_type = DistributedType.NO
    num_processes = 1


def test_training_fails_when_the_library_uses_only_one_of_several_devices() -> None:
    with pytest.raises(TrainingError, match=r"does not train on several devices: .*NO, num_processes=1, Linear"):
        DeviceGroup(0, 2).check(_SingleProcess(), nn.Linear(1, 1))


def test_training_fails_when_weights_are_not_sharded_as_chosen() -> None:
    with pytest.raises(TrainingError, match=r"weight is stored as a whole tensor of shape \(1, 3\)") as caught:
        check_sharded(nn.Linear(3, 1, bias=False), 2)
    assert "train.sharding" in caught.value.todo
