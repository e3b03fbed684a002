"""Tests that callbacks decide only from the trainer's state: time, held-out loss and training loss."""

import signal
from collections.abc import Iterable
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from svc.errors import TrainingError
from trainer.callbacks.checkpoint_schedule import CheckpointSchedule
from trainer.callbacks.divergence import DivergenceWatch, diverged
from trainer.callbacks.early_stopping import EarlyStopping, best_step, out_of_patience
from trainer.callbacks.heldout_schedule import HeldoutSchedule
from trainer.callbacks.loss_log import LossReport
from trainer.callbacks.preemption import Preemption
from trainer.recipe.train import Checkpoints, Stopping

ARGS: Any = TrainingArguments


def state(losses: Iterable[float] = (), heldout: dict[int, float] | None = None, max_steps: int = 1000) -> TrainerState:
    history: list[dict[str, float]] = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    history += [{"step": step, "heldout_loss": loss} for step, loss in (heldout or {}).items()]
    return TrainerState(global_step=max(len(history), 1), max_steps=max_steps, log_history=history)


def watch(losses: list[float], **logs: float) -> None:
    trainer_state = state(losses)
    DivergenceWatch(3e-4).on_log(ARGS, trainer_state, TrainerControl(), {"loss": losses[-1], **logs})


def test_run_continues_when_the_loss_falls() -> None:
    watch([3 - 0.02 * step for step in range(100)])


def test_run_continues_when_a_few_batches_have_a_high_loss() -> None:
    watch([1.0] * 60 + [9.0, 8.0] + [1.0] * 10)


def test_run_continues_when_a_small_loss_doubles() -> None:
    watch([0.1] * 40 + [0.4] * 40)


def test_exploding_loss_stops_the_run_and_the_error_gives_advice() -> None:
    with pytest.raises(TrainingError, match=r"the loss exploded: it averages 10\.000 over the last 20 steps") as caught:
        watch([3.0] * 40 + [10.0] * 20)
    assert "lower train.learning_rate from 0.0003 to 0.0001" in caught.value.todo


def test_run_continues_when_batches_with_high_loss_cluster_late_in_training() -> None:
    watch([0.1] * 14 + [4.0] * 6 + [0.1] * 6 + [4.0] * 14)


def test_loss_exploding_within_20_steps_stops_the_run() -> None:
    with pytest.raises(
        TrainingError, match=r"10\.000 over the last 20 steps up to step 30, compared with 1\.000 over the first 5"
    ):
        watch([1.0] * 6 + [10.0] * 24)


@pytest.mark.parametrize("growth", [1.1, 1.5])
def test_steadily_growing_loss_stops_the_run(growth: float) -> None:
    with pytest.raises(TrainingError, match="the loss exploded"):
        watch([2.0] * 30 + [2.0 * growth**step for step in range(60)])


def test_non_finite_gradient_stops_the_run() -> None:
    with pytest.raises(TrainingError, match="the gradient norm is nan at step 1"):
        watch([3.0], grad_norm=float("nan"))


class Optimizer:
    """An optimizer that reports skipped steps as accelerate does."""

    step_was_skipped = True


def test_run_stops_after_too_many_consecutive_steps_are_skipped_due_to_float16_overflow() -> None:
    watch = DivergenceWatch(3e-4)

    def step(**logs: float) -> None:
        watch.on_log(ARGS, state([3.0]), TrainerControl(), logs, optimizer=Optimizer())

    for _ in range(3):
        for _ in range(20):
            step(loss=3.0, grad_norm=float("inf"))
        step(loss=3.0, grad_norm=1.0)
    for _ in range(20):
        step(loss=3.0, grad_norm=float("inf"))
        step(heldout_loss=3.0)
    with pytest.raises(TrainingError, match="the gradient norm is inf"):
        step(loss=3.0, grad_norm=float("inf"))


def asks(clock: CheckpointSchedule, step: int) -> bool:
    control = TrainerControl()
    clock.on_step_end(ARGS, TrainerState(global_step=step), control)
    if control.should_save:
        clock.on_save(ARGS, TrainerState(global_step=step), control)
    return control.should_save


def test_checkpoint_is_due_after_the_configured_number_of_minutes() -> None:
    now = 0.0
    clock = CheckpointSchedule(Checkpoints(every_minutes=2), Preemption(), clock=lambda: now)
    due = []
    for step in range(1, 10):
        now += 50
        due.append(asks(clock, step))
    assert due == [False, False, True, False, False, True, False, False, True]


def test_checkpoint_is_due_after_the_configured_number_of_steps() -> None:
    clock = CheckpointSchedule(Checkpoints(every_steps=3), Preemption(), clock=lambda: 0.0)
    assert [step for step in range(1, 10) if asks(clock, step)] == [3, 6, 9]


def test_signal_during_evaluation_saves_a_checkpoint_and_stops_the_run() -> None:
    preemption, control = Preemption(), TrainerControl()
    clock = CheckpointSchedule(Checkpoints(), preemption, clock=lambda: 0.0)
    clock.on_evaluate(ARGS, state(), control)
    assert not control.should_save
    preemption.by = signal.SIGTERM
    clock.on_evaluate(ARGS, state(), control)
    assert control.should_save
    assert control.should_training_stop


@pytest.mark.parametrize(
    ("losses", "patience", "over"),
    [
        ({10: 1.0, 20: 0.9, 30: 0.8}, 1, False),
        ({10: 1.0, 20: 0.9, 30: 0.95}, 1, True),
        ({10: 1.0, 20: 0.9, 30: 0.95}, 2, False),
        ({10: 1.0, 20: 0.9, 30: 0.9, 40: 0.9}, 2, True),
        ({10: 1.0, 20: 1.1, 30: 1.2}, None, False),
        ({}, 1, False),
    ],
)
def test_patience_counts_heldout_evaluations_without_improvement(
    losses: dict[int, float], patience: int | None, over: bool
) -> None:
    assert out_of_patience(state(heldout=losses), patience) is over


def test_best_step_is_the_earliest_step_with_the_lowest_loss() -> None:
    assert best_step(state(heldout={10: 1.0, 20: 0.5, 30: 0.5})) == 20


def test_held_out_loss_is_measured_at_the_configured_interval_and_at_the_last_step() -> None:
    watch, measured = EarlyStopping(Stopping(), HeldoutSchedule(every_steps=4, points=10)), []
    for step in range(1, 11):
        control = TrainerControl()
        watch.on_step_end(ARGS, TrainerState(global_step=step, max_steps=10), control)
        if control.should_evaluate:
            measured.append(step)
    assert measured == [4, 8, 10]


def reported(steps: int) -> dict[int, float]:
    """Return the losses reported by a run in which each step's loss is its step number."""
    reports: dict[int, float] = {}
    report = LossReport(lambda step, figures: reports.update({step: figures["loss"]}))
    for step in range(1, steps + 1):
        losses = [float(number) for number in range(1, step + 1)]
        now = TrainerState(log_history=state(losses).log_history, global_step=step, max_steps=steps)
        report.on_log(ARGS, now, TrainerControl(), {"loss": float(step)})
    return reports


@pytest.mark.slow
def test_long_run_reports_100_averaged_losses() -> None:
    reports = reported(1000)
    assert len(reports) == 100
    assert reports[10] == 5.5


def test_last_step_is_reported_even_if_not_a_multiple_of_the_interval() -> None:
    assert list(reported(250))[-2:] == [248, 250]
    assert list(reported(201))[-2:] == [200, 201]


def test_every_step_of_a_short_run_is_reported() -> None:
    assert reported(30) == {step: float(step) for step in range(1, 31)}


def test_float16_overflow_error_does_not_blame_the_learning_rate() -> None:
    error = diverged("the loss is inf at step 1", 5e-4, first_in_float16=True)
    assert "too large for float16" in error.wrong
    assert "learning_rate" not in error.todo
