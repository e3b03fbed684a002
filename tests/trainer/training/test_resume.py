"""Tests that a run interrupted at any moment ends with the same curve and weights, bit for bit."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerState
from transformers.trainer import Accelerator

from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType
from svc.errors import InterruptedRunError
from svc.registry.objects import ObjectStore
from tests.builders.resumed_training import assert_same, train_in, train_until
from tests.builders.trainings import weights
from tests.trainer.conftest import losses_of, make_recipe
from tests.trainer.uninterrupted import UninterruptedRuns
from tests.trainer.without_clock import without_clock
from trainer.callbacks.early_stopping import best_step
from trainer.recipe.adapter import Method
from trainer.recipe.recipe import Recipe
from trainer.training import sft
from trainer.training import trainer as trainer_module
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData

pytestmark = pytest.mark.slow

STEPS = 12  # three epochs of four steps
BFLOAT16, FLOAT16, FLOAT32 = NumberType
LIKE_LORA = (Method.DORA, Method.VERA)  # for a checkpoint: other adapter weights, and nothing else
METHODS = [pytest.param(method, marks=pytest.mark.matrix) if method in LIKE_LORA else method for method in Method]


def recipe(method: Method = Method.LORA, **sections: Any) -> Recipe:
    train = {"batch_size": 3, "epochs": 3, "learning_rate": 1e-2, "neftune_alpha": 5}
    adapter: dict[str, Any] = {} if method is Method.FULL else {"rank": 4}
    if method not in (Method.FULL, Method.ADALORA):
        adapter["dropout"] = 0.1
    content = {"method": method.value, "adapter": adapter, "train": train, "checkpoints": {"every_steps": 1}}
    return make_recipe(**content | sections)


@pytest.fixture
def data(examples: list[ChatExample]) -> TrainingData:
    return TrainingData(examples, examples[:5])


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_matches_an_uninterrupted_run_for_every_method(
    method: Method,
    tiny_base: Path,
    data: TrainingData,
    uninterrupted: UninterruptedRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run is interrupted mid-epoch, at an epoch's end and after its first step, and resumes a step earlier."""
    whole = uninterrupted.run(recipe(method))
    for step in (3, 5, 9):
        train_until(tiny_base, data, recipe(method), tmp_path / "b", step, monkeypatch)
    resumed = train_in(BFLOAT16, tiny_base, data, recipe(method), tmp_path / "b")
    assert_same(resumed, tmp_path / "b", whole)


def test_run_resumed_on_another_machine_matches_an_uninterrupted_run(
    tiny_base: Path,
    data: TrainingData,
    uninterrupted: UninterruptedRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = uninterrupted.run(recipe())
    objects = ObjectStore(f"file://{tmp_path / 'shared'}")
    (tmp_path / "shared").mkdir()
    machines = [tmp_path / name for name in ("gone", "other")]
    gone, other = (
        SharedCheckpoints(objects, "run", folder / "checkpoints", folder / "mlflow.json") for folder in machines
    )
    for folder in machines:
        folder.mkdir()
        (folder / "mlflow.json").write_text("{}", "utf-8")
    train_until(tiny_base, data, recipe(), machines[0], 6, monkeypatch, shared=gone)
    assert other.fetch() == "step-00000005"
    resumed = train_in(BFLOAT16, tiny_base, data, recipe(), machines[1], other)
    assert_same(resumed, machines[1], whole)


@pytest.mark.parametrize(
    "method", [Method.FULL, *(pytest.param(each, marks=pytest.mark.matrix) for each in (Method.QLORA, Method.ADALORA))]
)
def test_resumed_float32_run_matches_an_uninterrupted_run(
    method: Method,
    tiny_base: Path,
    data: TrainingData,
    uninterrupted: UninterruptedRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = uninterrupted.run(recipe(method), FLOAT32)
    train_until(tiny_base, data, recipe(method), tmp_path / "b", 6, monkeypatch, FLOAT32)
    resumed = train_in(FLOAT32, tiny_base, data, recipe(method), tmp_path / "b")
    assert_same(resumed, tmp_path / "b", whole)


@pytest.fixture
def scaled_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use float16 as on an older GPU, but computed on the CPU, where accelerate does not scale the loss itself.

    The loss scale starts so high that steps are skipped, and grows after two steps, so that a resumed run
    must restore it.
    """
    original = Accelerator.__init__

    def with_scaler(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        if self.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2)

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)


def left_out(folder: Path, step: int) -> list[int]:
    """Return the steps, up to a checkpoint, whose gradients were not finite."""
    path = CheckpointFolder(folder / "checkpoints", 2).at(step) / "trainer_state.json"
    history = json.loads(path.read_text("utf-8"))["log_history"]
    return [entry["step"] for entry in history if not math.isfinite(entry.get("grad_norm", 0.0))]


@pytest.mark.parametrize(
    "method", [Method.LORA, *(pytest.param(each, marks=pytest.mark.matrix) for each in (Method.FULL, Method.ADALORA))]
)
@pytest.mark.usefixtures("scaled_on_cpu")
def test_resumed_float16_run_matches_an_uninterrupted_run(
    method: Method,
    tiny_base: Path,
    data: TrainingData,
    uninterrupted: UninterruptedRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = uninterrupted.run(recipe(method), FLOAT16)
    for step in (3, 9):
        train_until(tiny_base, data, recipe(method), tmp_path / "b", step, monkeypatch, FLOAT16)
    resumed = train_in(FLOAT16, tiny_base, data, recipe(method), tmp_path / "b")
    assert left_out(whole.folder, STEPS), "no step was skipped, so nothing was tested"
    assert_same(resumed, tmp_path / "b", whole)


@pytest.mark.usefixtures("scaled_on_cpu")
def test_adalora_importance_averages_stay_finite_after_a_skipped_step(
    tiny_base: Path, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until(tiny_base, data, recipe(Method.ADALORA), tmp_path, 7, monkeypatch, FLOAT16)
    assert left_out(tmp_path, 6)
    means = load_file(CheckpointFolder(tmp_path / "checkpoints", 2).at(6) / "rank_allocator.safetensors")
    assert all(mean.isfinite().all() for mean in means.values())
    assert any(mean.any() for mean in means.values()), "no step was taken"


@pytest.mark.parametrize(
    ("begun", "goes_on"),
    [
        (BFLOAT16, FLOAT32),
        pytest.param(FLOAT32, BFLOAT16, marks=pytest.mark.matrix),
        pytest.param(FLOAT16, FLOAT32, marks=pytest.mark.matrix),
        (FLOAT32, FLOAT16),
    ],
)
@pytest.mark.usefixtures("scaled_on_cpu")
def test_resuming_in_a_different_dtype_converts_the_checkpoint_and_says_so(
    begun: NumberType,
    goes_on: NumberType,
    tiny_base: Path,
    data: TrainingData,
    uninterrupted: UninterruptedRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = uninterrupted.run(recipe(), begun).summary
    capsys.readouterr()
    train_until(tiny_base, data, recipe(), tmp_path / "b", 7, monkeypatch, begun)
    assert "converted" not in capsys.readouterr().err
    resumed = train_in(goes_on, tiny_base, data, recipe(), tmp_path / "b")
    output = " ".join(capsys.readouterr().err.split())
    assert f"checkpoint of step 6 converted from {begun} to {goes_on}" in output
    assert "rounding makes the result differ from an uninterrupted run" in output
    assert resumed.steps == whole.steps
    assert losses_of(resumed)[-1] == pytest.approx(losses_of(whole)[-1], rel=0.05)
    newest = CheckpointFolder(tmp_path / "b" / "checkpoints", 2).newest()
    assert newest is not None
    assert trainer_module.number_type_of(newest) is goes_on
    if goes_on is FLOAT16:
        assert max(left_out(tmp_path / "b", STEPS)) > 6, "the scale of the loss was not found anew"


def test_weights_of_a_finished_run_are_not_converted_to_a_different_dtype(
    tiny_base: Path, data: TrainingData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in(BFLOAT16, tiny_base, data, recipe(), tmp_path)
    first = weights(tmp_path)
    train_in(FLOAT32, tiny_base, data, recipe(), tmp_path)
    assert weights(tmp_path) == first
    assert "converted" not in capsys.readouterr().err


def test_checkpoint_without_a_recorded_dtype_is_treated_as_bfloat16(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    assert trainer_module.number_type_of(tmp_path) is BFLOAT16


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"batch_size": 2, "gradient_accumulation": 2, "epochs": 2.5, "learning_rate": 1e-2}},
        {"train": {"batch_size": 3, "steps": 10, "schedule": "cosine", "learning_rate": 1e-2}},
        {"stopping": {"every_steps": 2, "keep_best": True, "patience": 2}},
        {"train": {"batch_size": 12, "steps": 20, "learning_rate": 1e-2}},
        {"train": {"batch_size": 1, "epochs": 3, "packing": True, "max_length": 300, "learning_rate": 1e-2}},
    ],
    ids=["accumulation", "steps", "stopping", "curve", "packing"],
)
def test_resumed_run_matches_an_uninterrupted_run_for_various_recipe_settings(
    sections: dict[str, Any],
    tiny_base: Path,
    data: TrainingData,
    uninterrupted: UninterruptedRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = recipe(**sections)
    whole = uninterrupted.run(changed)
    for step in (2, 6):
        train_until(tiny_base, data, changed, tmp_path / "b", step, monkeypatch)
    resumed = train_in(BFLOAT16, tiny_base, data, changed, tmp_path / "b")
    assert_same(resumed, tmp_path / "b", whole)


def test_result_does_not_depend_on_the_checkpoint_interval(
    tiny_base: Path, data: TrainingData, uninterrupted: UninterruptedRuns, tmp_path: Path
) -> None:
    train_in(BFLOAT16, tiny_base, data, recipe(checkpoints={"every_steps": 5}), tmp_path)
    assert weights(tmp_path) == weights(uninterrupted.run(recipe()).folder)


def test_run_interrupted_after_its_last_step_resumes_without_further_steps(
    tiny_base: Path, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_model(
        tiny_base, data, recipe(), tmp_path / "trained", tmp_path / "checkpoints", number_type=NumberType.BFLOAT16
    )
    first = (tmp_path / "trained" / "adapter_model.safetensors").read_bytes()
    again = train_model(
        tiny_base, data, recipe(), tmp_path / "trained", tmp_path / "checkpoints", number_type=NumberType.BFLOAT16
    )
    assert without_clock(again) == without_clock(whole)
    assert (tmp_path / "trained" / "adapter_model.safetensors").read_bytes() == first


def test_run_resumes_from_an_earlier_checkpoint_when_the_newest_is_corrupt(
    tiny_base: Path,
    data: TrainingData,
    uninterrupted: UninterruptedRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train_until(tiny_base, data, recipe(), tmp_path, 7, monkeypatch)
    newest = CheckpointFolder(tmp_path / "checkpoints", 2).at(6)
    with (newest / "weights.safetensors").open("r+b") as file:
        file.truncate(1000)
    train_in(BFLOAT16, tiny_base, data, recipe(), tmp_path)
    assert weights(tmp_path) == weights(uninterrupted.run(recipe()).folder)


# Imports once, then trains in a new process for each line of input; prints the process id and the outcome.
SCRIPT = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from svc.dataset.readers.reader import read_examples
from svc.engine.device import NumberType
from tests.trainer.training.test_resume import recipe
from trainer.training.sft import train_model
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints
from trainer.training.summary import TrainingData
for line in sys.stdin:
    folder = Path(line.strip())
    process = os.fork()
    if process == 0:
        examples = read_examples(folder / "train.jsonl")
        data = TrainingData(examples, examples[:5])
        out, checkpoints = folder / "trained", folder / "checkpoints"
        train_model(Path(sys.argv[1]), data, recipe(), out, checkpoints, number_type=NumberType.BFLOAT16)
        os._exit(0)
    print(process, flush=True)
    print(os.waitpid(process, 0)[1], flush=True)
"""


def files(folder: Path) -> set[str]:
    """Return all paths in a folder from which files may disappear while it is read."""
    return {os.path.join(root, name) for root, folders, names in os.walk(folder) for name in (*folders, *names)}


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.matrix)])
def test_run_killed_at_any_moment_resumes_with_the_same_result(
    kills: int, tiny_base: Path, data: TrainingData, uninterrupted: UninterruptedRuns, tmp_path: Path
) -> None:
    """SIGKILL is sent each time another checkpoint file appears, whether it is complete or not."""
    write_examples(tmp_path / "train.jsonl", data.train)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny_base)],
        cwd=Path(__file__).parents[3],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as trainer:
        assert trainer.stdin
        assert trainer.stdout

        def start() -> int:
            assert trainer.stdin
            assert trainer.stdout
            print(tmp_path, file=trainer.stdin, flush=True)
            return int(trainer.stdout.readline())

        seen: set[str] = set()
        for _ in range(kills):
            process = start()
            while not (new := files(tmp_path / "checkpoints") - seen):
                os.kill(process, 0)
                time.sleep(0.001)
            seen |= new
            os.kill(process, signal.SIGKILL)
            assert int(trainer.stdout.readline()) == signal.SIGKILL
        start()
        assert int(trainer.stdout.readline()) == 0
        trainer.stdin.close()
    assert weights(tmp_path) == weights(uninterrupted.run(recipe()).folder)


def test_checkpoint_is_written_when_a_signal_stops_the_run(
    tiny_base: Path, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = CheckpointFolder.writing

    def signal_at_step_four(self: CheckpointFolder, step: int, best: int | None = None) -> Any:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(self, step, best)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(CheckpointFolder, "writing", signal_at_step_four)
    with pytest.raises(InterruptedRunError, match="SIGTERM after step 4 of 12"):
        train_model(
            tiny_base, data, recipe(), tmp_path / "trained", tmp_path / "checkpoints", number_type=NumberType.BFLOAT16
        )
    newest = CheckpointFolder(tmp_path / "checkpoints", 2).newest()
    assert newest is not None
    assert json.loads((newest / "trainer_state.json").read_text("utf-8"))["global_step"] == 4
    assert signal.getsignal(signal.SIGTERM) is before


def test_keyboard_interrupt_stops_the_run_even_while_weights_are_being_written(
    tiny_base: Path, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "save_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train_model(
            tiny_base, data, recipe(), tmp_path / "trained", tmp_path / "checkpoints", number_type=NumberType.BFLOAT16
        )


def test_run_is_interrupted_by_a_signal_received_while_the_trained_weights_are_being_checked(
    tiny_base: Path, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_training(state: TrainerState) -> int | None:
        monkeypatch.setattr(
            trainer_module.ResumableTrainer, "check_finite", lambda trainer: os.kill(os.getpid(), signal.SIGTERM)
        )
        return best_step(state)

    monkeypatch.setattr(sft, "best_step", after_training)
    with pytest.raises(InterruptedRunError, match="SIGTERM after step 12 of 12"):
        train_model(
            tiny_base, data, recipe(), tmp_path / "trained", tmp_path / "checkpoints", number_type=NumberType.BFLOAT16
        )
