"""Tests that the training benchmark compares speeds within rounds and losses step by step, on real runs."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from benchmarks import training_speed
from benchmarks.training_speed import (
    RIVALS,
    SAME,
    UNSLOTH_PYTHON,
    Contestant,
    Run,
    Task,
    choose_rivals,
    find_unsloth,
    fitted_checkpointing,
    kernel_options,
    show,
    summary,
    train,
)
from svc.engine.device import NumberType
from tests.benchmarks import unsloth_stand_in
from tests.trainer.conftest import make_example, make_model, make_recipe
from tests.trainer.estimate.configs import cpu_device
from trainer.model.acceleration import Acceleration, Attention, Facts

pytestmark = pytest.mark.slow

CURVES = {
    Contestant.OURS: Run(100, 1.0, 1, (2.0, 1.0)),
    Contestant.ALIKE: Run(100, 1.0, 1, (2.02, 1.0)),
}


def a_round(ours: float, trl: float, grouped: float) -> dict[Contestant, Run]:
    """Return runs of 100 tokens that took the given durations in seconds."""
    seconds = {Contestant.OURS: ours, Contestant.TRL: trl, Contestant.GROUPED: grouped}
    return {one: Run(100, took, 1, (1.0,)) for one, took in seconds.items()}


# The machine was half as fast in the second round.
ROUNDS = [a_round(1.0, 3.0, 2.0), a_round(2.0, 6.0, 4.0), a_round(1.0, 4.0, 2.0)]


def test_training_speed_is_median_tokens_per_second() -> None:
    assert summary(ROUNDS, CURVES)["tokens_per_second"][Contestant.TRL] == pytest.approx(100 / 4)


def test_speed_ratios_do_not_change_if_all_trainers_are_slow_in_one_round() -> None:
    result = summary(ROUNDS[:2], CURVES)["times_as_fast"]
    assert result[Contestant.TRL] == {"median": pytest.approx(3.0), "interval": pytest.approx((3.0, 3.0))}
    assert result[Contestant.GROUPED]["median"] == pytest.approx(2.0)


def test_training_losses_of_both_trainers_are_reported_in_pairs() -> None:
    result = summary(ROUNDS, CURVES)
    assert result["losses"] == [(2.0, 2.02), (1.0, 1.0)]
    assert result["mean_loss_difference"] == pytest.approx(0.02 / 3.02)
    assert result["other_loss_differences"] == {}


ALL = {"flash_attention_2": True, "liger_kernels": True}
AMPERE = (8, 0)


@pytest.mark.parametrize(
    ("facts", "unsloth", "more"),
    [
        (Facts(None, **ALL), "python", ()),
        (Facts(AMPERE), None, ()),
        (Facts(AMPERE), "python", (Contestant.UNSLOTH,)),
        (Facts(AMPERE, flash_attention_2=True), None, (Contestant.KERNELS,)),
        (Facts(AMPERE, **ALL), "python", (Contestant.KERNELS, Contestant.UNSLOTH)),
    ],
)
def test_gpu_comparison_includes_only_trainers_whose_packages_are_installed(
    facts: Facts, unsloth: str | None, more: tuple[Contestant, ...]
) -> None:
    assert choose_rivals(facts, unsloth) == (*RIVALS, *more)


def test_unsloth_runs_in_the_configured_interpreter_or_else_in_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(UNSLOTH_PYTHON, raising=False)
    monkeypatch.setattr(training_speed, "find_spec", lambda name: None)
    assert find_unsloth() is None
    monkeypatch.setattr(training_speed, "find_spec", lambda name: object())
    assert find_unsloth() == sys.executable
    monkeypatch.setenv(UNSLOTH_PYTHON, "/other/python")
    assert find_unsloth() == "/other/python"


def test_gpu_table_has_a_speed_row_and_a_loss_column_per_trainer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    unsloth = Run(100, 0.5, 3 * 10**9, (2.04, 1.0))
    rounds = [each | {Contestant.UNSLOTH: unsloth} for each in ROUNDS]
    rounds = [each | {Contestant.OURS: replace(each[Contestant.OURS], flops=4.0, matrix_speed=10.0)} for each in rounds]
    curves = CURVES | {Contestant.UNSLOTH: unsloth}
    result = summary(rounds, curves)
    assert result["other_loss_differences"] == {Contestant.UNSLOTH: pytest.approx(0.04 / 3.04)}
    show(result, tuple(curves), 3, NumberType.BFLOAT16, "H100, checkpointing off")
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 rounds in bfloat16 on H100, checkpointing off" in printed
    assert "Unsloth, our order 200 3.00 0.50 x" in printed
    assert "mean loss differs from that of Unsloth, our order by 1.32%" in printed
    assert "promised on a CPU" not in printed


def test_loss_curves_of_different_lengths_are_rejected() -> None:
    with pytest.raises(ValueError, match="shorter"):
        summary(ROUNDS, CURVES | {Contestant.ALIKE: Run(100, 1.0, 1, (2.0,))})


def test_fraction_of_matmul_throughput_is_a_median_and_requires_measured_flops() -> None:
    shares = [Run(100, 2.0, 1, (1.0,), flops=flops, matrix_speed=10.0) for flops in (8.0, 10.0, 14.0)]
    rounds = [a_round(1.0, 3.0, 2.0) | {Contestant.OURS: run} for run in shares]
    assert summary(rounds, CURVES)["share"] == pytest.approx(10 / 2 / 10)
    assert summary(ROUNDS, CURVES)["share"] is None


@pytest.fixture(scope="module", params=[NumberType.BFLOAT16, NumberType.FLOAT32])
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Return a training task of a few steps on a tiny model."""
    examples = tuple(make_example("x" * (7 * number % 30), f"colour {number}") for number in range(24))
    recipe = make_recipe(train={"batch_size": 4, "learning_rate": 1e-2})
    return Task(make_model(tmp_path_factory.mktemp("base")), recipe, examples, request.param)


@pytest.fixture(scope="module")
def runs(task: Task) -> dict[Contestant, Run]:
    return {contestant: train(contestant, task) for contestant in (Contestant.OURS, *RIVALS, Contestant.ALIKE)}


def test_all_compared_trainers_train_on_the_same_tokens(runs: dict[Contestant, Run]) -> None:
    assert len({run.tokens for run in runs.values()}) == 1
    assert {len(run.losses) for run in runs.values()} == {6}


def test_losses_match_trl_when_examples_are_in_the_same_order(runs: dict[Contestant, Run]) -> None:
    ours, alike = runs[Contestant.OURS].losses, runs[Contestant.ALIKE].losses
    assert ours == pytest.approx(alike, rel=SAME)
    assert ours[-1] < ours[0] - 0.3


def test_trl_does_not_use_our_example_order_by_default(runs: dict[Contestant, Run]) -> None:
    # The examples of this task are similar, so that losses of other batches differ by less than 1%.
    assert runs[Contestant.TRL].losses != pytest.approx(runs[Contestant.ALIKE].losses, rel=SAME / 5)


def test_fraction_of_matmul_throughput_is_reported_only_for_our_trainer(runs: dict[Contestant, Run]) -> None:
    share = runs[Contestant.OURS].share
    assert share is not None
    assert 0 < share < 1
    assert runs[Contestant.TRL].share is None


@pytest.mark.matrix
def test_unsloth_trains_on_the_same_batches_as_our_trainer(
    task: Task, runs: dict[Contestant, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With PEFT in place of Unsloth, the losses are those of plain TRL in our order."""
    (tmp_path / "unsloth.py").write_text(Path(unsloth_stand_in.__file__).read_text("utf-8"), "utf-8")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift\nPYTHONPATH={tmp_path} exec {sys.executable} -P "$@"\n', "utf-8")
    python.chmod(0o755)
    monkeypatch.setenv(UNSLOTH_PYTHON, str(python))
    run = train(Contestant.UNSLOTH, task)
    assert run.tokens == runs[Contestant.OURS].tokens
    assert run.losses == pytest.approx(runs[Contestant.ALIKE].losses, rel=SAME)


@pytest.mark.parametrize("attention", [Attention.SDPA, Attention.FLASH_2])
def test_chosen_attention_and_liger_kernels_are_passed_to_trl(attention: Attention) -> None:
    padding_free = attention is Attention.FLASH_2
    chosen = Acceleration(attention, padding_free=padding_free, liger_kernels=True, gradient_checkpointing=True)
    loading, options = kernel_options(chosen)
    assert loading == {"attn_implementation": attention.value}
    assert SFTConfig(output_dir="unused", use_cpu=True, **options).padding_free is padding_free
    assert options["use_liger_kernel"]


def test_installed_kernels_are_passed_to_trl(
    task: Task, runs: dict[Contestant, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    real = AutoModelForCausalLM.from_pretrained

    def load(*arguments: Any, **options: Any) -> Any:
        used.append(options["attn_implementation"])
        return real(*arguments, **options)

    chosen = Acceleration(Attention.SDPA, padding_free=False, liger_kernels=False, gradient_checkpointing=True)
    monkeypatch.setattr(training_speed, "choose_acceleration", lambda facts: chosen)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    losses = train(Contestant.KERNELS, task).losses
    assert used == ["sdpa"]
    assert losses == pytest.approx(runs[Contestant.ALIKE].losses, rel=SAME)


@pytest.mark.parametrize(("memory", "checkpointing"), [(1e12, False), (1e6, True)])
def test_gpu_trainers_use_gradient_checkpointing_only_if_memory_is_scarce(
    memory: float, checkpointing: bool, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = replace(cpu_device(memory), cpu=False)
    monkeypatch.setattr(training_speed, "choose_devices", lambda names, home: [gpu])
    assert fitted_checkpointing(task.recipe, task.base, task.examples, tmp_path) is checkpointing
