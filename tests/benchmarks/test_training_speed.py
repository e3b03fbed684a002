"""Tests that the training benchmark compares speeds within rounds and losses step by step, on real runs."""

import pytest

from benchmarks.training_speed import SAME, Contestant, Run, Task, summary, train
from svc.engine.device import NumberType
from tests.trainer.conftest import make_example, make_model, make_recipe

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


def test_speed_ratios_are_unchanged_if_a_whole_round_is_slow() -> None:
    result = summary(ROUNDS[:2], CURVES)["times_as_fast"]
    assert result[Contestant.TRL] == {"median": pytest.approx(3.0), "interval": pytest.approx((3.0, 3.0))}
    assert result[Contestant.GROUPED]["median"] == pytest.approx(2.0)


def test_training_losses_are_reported_in_pairs() -> None:
    result = summary(ROUNDS, CURVES)
    assert result["losses"] == [(2.0, 2.02), (1.0, 1.0)]
    assert result["mean_loss_difference"] == pytest.approx(0.02 / 3.02)


def test_loss_curves_of_different_lengths_are_rejected() -> None:
    with pytest.raises(ValueError, match="shorter"):
        summary(ROUNDS, CURVES | {Contestant.ALIKE: Run(100, 1.0, 1, (2.0,))})


def test_machine_speed_share_is_median_over_rounds_that_measured_it() -> None:
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
    return {contestant: train(contestant, task) for contestant in Contestant}


def test_all_compared_trainers_train_on_the_same_tokens(runs: dict[Contestant, Run]) -> None:
    assert len({run.tokens for run in runs.values()}) == 1
    assert {len(run.losses) for run in runs.values()} == {6}


def test_losses_equal_those_of_trl_when_example_order_is_the_same(runs: dict[Contestant, Run]) -> None:
    ours, alike = runs[Contestant.OURS].losses, runs[Contestant.ALIKE].losses
    assert ours == pytest.approx(alike, rel=SAME)
    assert ours[-1] < ours[0] - 0.3


def test_plain_trl_uses_a_different_example_order(runs: dict[Contestant, Run]) -> None:
    # The examples of this task are similar, so that losses of other batches differ by less than 1 %.
    assert runs[Contestant.TRL].losses != pytest.approx(runs[Contestant.ALIKE].losses, rel=SAME / 5)


def test_only_our_trainer_reports_its_share_of_the_machine_speed(runs: dict[Contestant, Run]) -> None:
    share = runs[Contestant.OURS].share
    assert share is not None
    assert 0 < share < 1
    assert runs[Contestant.TRL].share is None
