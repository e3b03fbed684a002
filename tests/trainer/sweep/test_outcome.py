"""Tests the choice among several trials and the definition of overfitting."""

import pytest

from tests.trainer.sweep.fake_trials import LEVELS, TOKENS, outcome
from trainer.sweep.outcome import Status, TrialComparison, TrialOutcome
from trainer.training_curve import TrainingPoint

COMPARISON = TrialComparison(TOKENS)
NOISY = tuple(level + shift for level, shift in zip(LEVELS, (0.3, -0.4, 0.2, -0.3, 0.4, -0.3, 0.2, -0.2), strict=True))
"""Losses that are slightly better than the plain losses on average, but not significantly."""


def test_first_listed_trial_is_chosen_if_no_difference_is_significant() -> None:
    plain, noisy, worse = outcome(0, "plain"), outcome(0, "noisy", each=NOISY), outcome(1, "worse")
    assert noisy.mean < plain.mean
    assert COMPARISON.choose([worse, plain, noisy]).key == "plain"
    assert COMPARISON.choose([worse, noisy, plain]).key == "noisy"


def test_small_difference_is_significant_if_consistent_across_examples() -> None:
    assert COMPARISON.choose([outcome(0.01, "default"), outcome(0, "better")]).key == "better"


def test_incomplete_trial_is_never_chosen() -> None:
    pruned = TrialOutcome(key="pruned", values={}, status=Status.PRUNED)
    assert COMPARISON.choose([pruned, outcome(1, "complete")]).key == "complete"


def test_answers_are_weighted_by_token_count_when_trials_are_compared() -> None:
    """The second trial is better only on the one long answer."""
    first, second = outcome(0), outcome(0, each=(LEVELS[0] - 0.1, *(level + 0.05 for level in LEVELS[1:])))
    assert TrialComparison(TOKENS).difference(first, second).value > 0
    assert TrialComparison((100, *TOKENS[1:])).difference(first, second).value < 0


def point(step: int, loss: float, *heldout: float) -> TrainingPoint:
    mean = sum(heldout) / len(heldout) if heldout else None
    return TrainingPoint(step=step, epoch=step, loss=loss, heldout_loss=mean, heldout_each=heldout)


@pytest.mark.parametrize(
    ("points", "overfits"),
    [
        ([point(1, 2.0, 0.5, 0.6, 0.7), point(2, 1.0, 0.9, 1.0, 1.2)], True),
        ([point(1, 2.0, 0.5, 0.6, 0.7), point(2, 1.0, 0.4, 0.5, 0.6)], False),  # it still falls
        ([point(1, 2.0, 0.5, 0.6, 0.7), point(2, 1.0, 0.1, 0.6, 1.2)], False),  # it rose by chance
        ([point(1, 1.0, 0.5, 0.6, 0.7), point(2, 2.0, 0.9, 1.0, 1.2)], False),  # training loss rose too
        ([point(1, 1.0)], False),
    ],
    ids=["rises", "falls", "chance", "diverges", "unmeasured"],
)
def test_trial_overfits_if_heldout_loss_rises_while_training_loss_falls(
    points: list[TrainingPoint], overfits: bool
) -> None:
    assert outcome(0, points=tuple(points)).overfits is overfits
