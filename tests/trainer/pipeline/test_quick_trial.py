"""A quick trial: little of everything, and nothing else changed."""

import pytest

from svc.dataset.fingerprint import fingerprint
from tests.trainer.conftest import make_example, make_recipe
from trainer.pipeline.examples import Examples
from trainer.pipeline.quick_trial import quick_trial, whole_run_seconds
from trainer.training.summary import TrainingSummary


def examples(train: int, heldout: int) -> Examples:
    many = tuple(make_example(f"q {number}", "yes") for number in range(train))
    judged = tuple(make_example(f"h {number}", "yes") for number in range(heldout))
    return Examples(many, judged, fingerprint(many), fingerprint(judged), (*many, *judged))


def test_a_tenth_is_trained_and_judged_for_one_epoch() -> None:
    recipe, cut = quick_trial(make_recipe(train={"epochs": 5, "steps": 900}), examples(101, 40))
    assert (len(cut.train), len(cut.heldout)) == (11, 4)
    assert (recipe.train.epochs, recipe.train.steps) == (1.0, None)
    assert cut.train_fingerprint == fingerprint(cut.train)


def test_its_version_has_a_name_of_its_own() -> None:
    assert quick_trial(make_recipe(), examples(20, 20))[0].name == "tiny-quick"


def test_all_else_stays() -> None:
    whole = make_recipe(method="vera", train={"batch_size": 4}, quantize={"group_size": 32})
    recipe, _ = quick_trial(whole, examples(20, 20))
    assert (recipe.method, recipe.rank, recipe.train.batch_size, recipe.quantize) == (
        whole.method,
        whole.rank,
        4,
        whole.quantize,
    )


def test_a_long_name_is_cut() -> None:
    name = quick_trial(make_recipe(name="a" * 63), examples(20, 20))[0].name
    assert name == "a" * 57 + "-quick"


def test_few_examples_leave_two() -> None:
    _, cut = quick_trial(make_recipe(), examples(5, 3))
    assert (len(cut.train), len(cut.heldout)) == (2, 2)


@pytest.mark.parametrize(("train", "seconds"), [({"epochs": 3}, 600.0), ({"steps": 50}, 100.0)])
def test_the_whole_run_is_foretold(train: dict[str, int], seconds: float) -> None:
    trial = TrainingSummary(10, 100, 5.0, 20.0)
    assert whole_run_seconds(make_recipe(train=train).train, trial) == seconds


def test_it_is_foretold_from_the_speed_of_a_trial_that_was_cut_off() -> None:
    """The seconds are those of its last process alone."""
    trial = TrainingSummary(10, 100, 5.0, 2.0)
    assert whole_run_seconds(make_recipe(train={"epochs": 3}).train, trial) == 600.0


def test_a_trial_without_a_step_of_its_own_foretells_nothing() -> None:
    trial = TrainingSummary(10, 100, 0.0, 0.1)
    assert whole_run_seconds(make_recipe().train, trial) is None
