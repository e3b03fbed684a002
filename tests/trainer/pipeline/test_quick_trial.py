"""Tests quick trials, which use fewer examples and one epoch and change nothing else."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.preference import PreferencePair
from tests.trainer.conftest import make_example, make_recipe
from trainer.data.fingerprint import fingerprint
from trainer.pipeline.examples import Examples, example_of, fingerprint_preferences
from trainer.pipeline.quick_trial import quick_trial, whole_run_seconds
from trainer.training.summary import TrainingSummary


def examples(train: int, heldout: int) -> Examples:
    many = tuple(make_example(f"q {number}", "yes") for number in range(train))
    judged = tuple(make_example(f"h {number}", "yes") for number in range(heldout))
    return Examples(many, judged, fingerprint(many), fingerprint(judged), (*many, *judged))


def test_quick_trial_uses_10_percent_of_the_examples_for_one_epoch() -> None:
    recipe, cut = quick_trial(make_recipe(train={"epochs": 5, "steps": 900}), examples(101, 40))
    assert (len(cut.train), len(cut.heldout)) == (11, 4)
    assert (recipe.train.epochs, recipe.train.steps) == (1.0, None)
    assert cut.train_fingerprint == fingerprint(cut.train)


def test_quick_trial_draws_examples_from_the_whole_file_even_if_it_is_sorted() -> None:
    _, cut = quick_trial(make_recipe(), examples(200, 200))
    numbers = [int(example.prompt[-1].content.split()[-1]) for example in (*cut.train, *cut.heldout)]
    assert len([number for number in numbers if number >= 100]) > 10
    assert quick_trial(make_recipe(data={"train": "t", "seed": 1}), examples(200, 200))[1].train != cut.train


def test_quick_trial_mixes_in_10_percent_of_the_general_examples() -> None:
    general = tuple(make_example(f"g {number}", "yes") for number in range(20))
    whole = examples(100, 20)
    _, cut = quick_trial(make_recipe(), replace(whole, train=(*whole.train, *general), general=20))
    assert cut.general == 2
    assert set(cut.train[-2:]) <= set(general)
    assert len(set(cut.train[:-2]) - set(general)) == 10


def test_quick_trial_of_a_preference_recipe_uses_10_percent_of_the_pairs() -> None:
    whole = examples(100, 40)

    def pairs(better: Sequence[ChatExample]) -> tuple[PreferencePair, ...]:
        return tuple(PreferencePair(example, make_example(example.question, "no")) for example in better)

    judged = replace(whole, preferences=pairs(whole.train), heldout_preferences=pairs(whole.heldout))
    _, cut = quick_trial(make_recipe(objective="dpo"), judged)
    assert [example_of(pair) for pair in cut.preferences] == list(cut.train)
    assert [pair.chosen for pair in cut.pairs] == list(cut.heldout)
    assert (len(cut.preferences), len(cut.pairs)) == (10, 4)
    assert cut.train_fingerprint == fingerprint_preferences(cut.preferences)


def test_quick_trial_version_has_its_own_name() -> None:
    assert quick_trial(make_recipe(), examples(20, 20))[0].name == "tiny-quick"


def test_quick_trial_leaves_recipe_keys_unrelated_to_its_size_unchanged() -> None:
    whole = make_recipe(method="vera", train={"batch_size": 4}, quantize={"group_size": 32})
    recipe, _ = quick_trial(whole, examples(20, 20))
    assert (recipe.method, recipe.rank, recipe.train.batch_size, recipe.quantize) == (
        whole.method,
        whole.rank,
        4,
        whole.quantize,
    )


def test_quick_trial_name_is_truncated_for_a_long_recipe_name() -> None:
    name = quick_trial(make_recipe(name="a" * 63), examples(20, 20))[0].name
    assert name == "a" * 57 + "-quick"


def test_quick_trial_uses_at_least_two_examples() -> None:
    _, cut = quick_trial(make_recipe(), examples(5, 3))
    assert (len(cut.train), len(cut.heldout)) == (2, 2)


@pytest.mark.parametrize(("train", "seconds"), [({"epochs": 3}, 600.0), ({"steps": 50}, 100.0)])
def test_duration_of_the_full_run_is_predicted_from_the_quick_trial(train: dict[str, int], seconds: float) -> None:
    trial = TrainingSummary(10, 100, 5.0, 20.0)
    assert whole_run_seconds(make_recipe(train=train).train, trial) == seconds


def test_duration_of_the_full_run_is_predicted_from_training_speed_if_the_trial_was_resumed() -> None:
    """The trial's duration covers only its last process."""
    trial = TrainingSummary(10, 100, 5.0, 2.0)
    assert whole_run_seconds(make_recipe(train={"epochs": 3}).train, trial) == 600.0


def test_duration_of_the_full_run_is_not_predicted_if_the_resumed_trial_ran_no_steps() -> None:
    trial = TrainingSummary(10, 100, 0.0, 0.1)
    assert whole_run_seconds(make_recipe().train, trial) is None
