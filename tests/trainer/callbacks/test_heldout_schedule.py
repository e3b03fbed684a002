"""Tests the schedule of held-out loss measurements, and the low cost of the default curve."""

from typing import Any

import pytest
from transformers import TrainerState

from trainer.callbacks.heldout_schedule import HeldoutCurve, HeldoutSchedule
from trainer.callbacks.loss_log import training_points


def measured(schedule: HeldoutSchedule, steps: int) -> list[int]:
    return [step for step in range(steps + 1) if schedule.due(TrainerState(global_step=step, max_steps=steps))]


def rows(count: int, tokens: int = 10) -> list[dict[str, Any]]:
    return [{"input_ids": [number] * tokens, "labels": [number] * tokens} for number in range(count)]


@pytest.mark.parametrize(
    ("schedule", "steps", "at"),
    [
        (HeldoutSchedule(None, 5), 83, [0, 17, 34, 50, 67, 83]),
        (HeldoutSchedule(None, 5), 10, [0, 2, 4, 6, 8, 10]),
        (HeldoutSchedule(None, 5), 3, [0, 1, 2, 3]),
        (HeldoutSchedule(None, 1), 7, [0, 7]),
        (HeldoutSchedule(4, 5), 10, [0, 4, 8, 10]),
    ],
)
def test_heldout_loss_is_measured_at_evenly_spaced_steps_including_the_first_and_last(
    schedule: HeldoutSchedule, steps: int, at: list[int]
) -> None:
    assert measured(schedule, steps) == at


@pytest.mark.parametrize(("trained", "heldout"), [(3_000, 20), (8_000, 200), (50_000, 200), (10**7, 500)])
def test_measuring_the_heldout_curve_uses_at_most_a_twelfth_of_the_trained_tokens(trained: int, heldout: int) -> None:
    curve = HeldoutCurve.affordable(rows(heldout), trained, 1000)
    measurements = len(measured(curve.schedule, 1000))
    assert 2 <= measurements <= 6
    assert 8 <= len(curve.rows) <= 64
    assert measurements * len(curve.rows) * 10 <= trained / 12


@pytest.mark.parametrize(("trained", "heldout"), [(1_000, 200), (10**6, 0)])
def test_no_heldout_curve_is_measured_for_a_short_run_or_without_heldout_examples(trained: int, heldout: int) -> None:
    assert HeldoutCurve.affordable(rows(heldout), trained, 1000).rows == []


@pytest.mark.parametrize(("batch", "measured_examples"), [(4, 19), (8, 38), (16, 64)])
def test_short_run_measures_heldout_loss_at_fewer_steps_but_on_more_examples(
    batch: int, measured_examples: int
) -> None:
    """A short run spends a quarter of its time on this, as a loss over fewer examples has too large an error."""
    curve = HeldoutCurve.affordable(rows(120), 24 * batch * 10, 24)
    assert measured(curve.schedule, 24) == [0, 12, 24]
    assert len(curve.rows) == measured_examples


def test_no_heldout_curve_is_measured_for_a_run_too_short_to_diagnose() -> None:
    assert HeldoutCurve.affordable(rows(120), 19 * 4 * 10, 19).rows == []


def test_heldout_curve_examples_are_deterministic_and_spread_over_the_whole_file() -> None:
    first = HeldoutCurve.affordable(rows(500), 10**6, 1000).rows
    assert first == HeldoutCurve.affordable(rows(500), 10**6, 1000).rows
    places = sorted(row["input_ids"][0] for row in first)
    assert places[0] < 50
    assert places[-1] > 450


def history(*entries: dict[str, Any]) -> TrainerState:
    return TrainerState(log_history=list(entries))


def test_training_loss_and_heldout_loss_of_a_step_form_one_curve_point() -> None:
    (start, step) = training_points(
        history(
            {"step": 0, "heldout_loss": 3.0, "heldout_each": [2.0, 4.0], "heldout_set": "a", "epoch": 0},
            {"step": 1, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0, "epoch": 0.5, "tokens_per_second": 9.0},
            {"step": 1, "heldout_loss": 2.5, "heldout_each": [2.0, 3.0], "heldout_set": "a", "epoch": 0.5},
        )
    )
    assert (start.step, start.loss, start.heldout_loss, start.heldout_each) == (0, None, 3.0, (2.0, 4.0))
    assert (step.step, step.loss, step.heldout_loss, step.epoch, step.learning_rate) == (1, 2.0, 2.5, 0.5, 0.1)
    assert (step.grad_norm, step.tokens_per_second) == (1.0, 9.0)


def test_non_finite_gradient_norm_is_recorded_as_none() -> None:
    (point,) = training_points(history({"step": 1, "loss": 2.0, "grad_norm": float("inf"), "epoch": 1.0}))
    assert point.grad_norm is None


def test_heldout_losses_measured_on_a_previous_heldout_set_are_omitted_from_the_curve() -> None:
    points = training_points(
        history(
            {"step": 1, "loss": 2.0, "epoch": 0.5},
            {"step": 1, "heldout_loss": 2.5, "heldout_each": [2.5], "heldout_set": "a"},
            {"step": 2, "loss": 1.5, "epoch": 1.0},
            {"step": 2, "heldout_loss": 1.0, "heldout_each": [1.0], "heldout_set": "b"},
        )
    )
    assert [point.heldout_loss for point in points] == [None, 1.0]
