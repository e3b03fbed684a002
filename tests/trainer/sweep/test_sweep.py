"""Tests a sweep's output and its plot."""

from pathlib import Path
from typing import Any

import pytest

from svc.evaluation.intervals import Interval
from svc.files.yaml_text import parse_yaml
from tests.trainer.conftest import make_recipe
from tests.trainer.sweep.fake_trials import LEVELS, TOKENS, FakeTrials, outcome
from trainer.recipe.file import load_recipe
from trainer.sweep.outcome import Status, TrialComparison, TrialOutcome
from trainer.sweep.picture import draw_sweep
from trainer.sweep.search import RANK, RATE, Phase, Search
from trainer.sweep.sweep import SweepResult, print_sweep, recipe_text, settings_of_winner, summarize
from trainer.sweep.values import describe, training_key, with_values

BASE = Interval(value=3, low=2, high=4)


def result_of(winner: TrialOutcome, *others: TrialOutcome) -> SweepResult:
    tried = [(Phase.LEARNING_RATE, trial) for trial in (winner, *others)]
    recipe = make_recipe()
    return summarize(
        Search(recipe, 5e-4, TrialComparison(TOKENS), FakeTrials(recipe, lambda _: 0).start, "", tried), winner, BASE
    )


def test_no_warning_is_printed_when_the_winner_is_significantly_better_than_the_runner_up() -> None:
    result = result_of(outcome(0, "a", {RATE: 1e-4}), outcome(0.5, "b", {RATE: 5e-4}))
    assert result.warning is None
    assert result.runner_up == {RATE: 5e-4}
    assert result.difference is not None
    assert result.difference.value == pytest.approx(0.5)


def test_warning_is_printed_when_the_winner_may_not_be_better_than_the_runner_up() -> None:
    each = [level + (0.3 if number % 2 else -0.3) for number, level in enumerate(LEVELS)]
    result = result_of(outcome(0, "a", {RATE: 1e-4}), outcome(0, "b", {RATE: 5e-4}, each=each))
    assert result.warning is not None
    assert "cannot be distinguished from learning_rate 0.0005" in result.warning


def test_flags_printed_for_the_winner_parse_back_to_its_values(tmp_path: Path) -> None:
    """YAML reads 5e-05 as a string and 5.0e-05 as a number."""
    values = {RATE: 5e-5, RANK: 8, "train.steps": None, "adapter.targets": "attention"}
    path = tmp_path / "recipe.yaml"
    path.write_text("{name: tiny, base: ./base, data: {train: train.jsonl, heldout: heldout.jsonl}}", "utf-8")
    recipe = load_recipe(path)
    flags = settings_of_winner(result_of(outcome(0, "a", values)))
    assert load_recipe(path, tuple(flags)) == with_values(recipe, values)


def test_winning_recipe_is_complete_and_has_no_sweep_section() -> None:
    recipe = make_recipe(sweep={"space": {RANK: [4, 8]}}, evaluate={"metrics": "rouge"}, method="dora")
    content: Any = parse_yaml(recipe_text(with_values(recipe, {RANK: 8})))
    assert "sweep" not in content
    assert type(recipe).model_validate(content) == with_values(recipe, {RANK: 8})


def test_runner_up_is_the_best_of_the_remaining_trials() -> None:
    winner, *others = (outcome(loss, key, {RATE: loss}) for key, loss in (("b", 0.5), ("a", 1.0), ("c", 0.7)))
    assert result_of(winner, *others).runner_up == {RATE: 0.7}


def test_sweep_table_shows_every_trial_and_explains_why_a_trial_was_pruned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned = TrialOutcome(key="c", values={RATE: 1e-5}, status=Status.PRUNED, why="at step 4 with loss 2.000")
    result = result_of(outcome(0, "a", {RATE: 1e-4}), outcome(0.5, "b", {RATE: 5e-4}), pruned)
    print_sweep(result, tmp_path, tmp_path / "trials.svg")
    output = capsys.readouterr().out
    assert all(text in output for text in ("learning_rate 0.0001", "learning_rate 0.0005", "pruned at step 4"))


@pytest.mark.slow
def test_sweep_plot_is_reproducible_byte_for_byte(tmp_path: Path) -> None:
    result = result_of(outcome(0, "a", {RATE: 1e-4}), outcome(0.5, "b", {RATE: 5e-4}))
    files = [draw_sweep(result, tmp_path / name).read_bytes() for name in ("one.svg", "two.svg")]
    assert files[0] == files[1]
    assert b"learning_rate" in files[0]


@pytest.mark.slow
def test_sweep_plot_supports_a_setting_with_both_numbers_and_null(tmp_path: Path) -> None:
    recipe = make_recipe()
    trials = [outcome(loss, str(loss), {RANK: rank}) for loss, rank in ((0, None), (1, 8), (2, 4))]
    search = Search(recipe, 5e-4, TrialComparison(TOKENS), FakeTrials(recipe, lambda _: 0).start, "")
    search.tried += [(Phase.SPACE, trial) for trial in trials]
    assert b"adapter.rank" in draw_sweep(summarize(search, trials[0], BASE), tmp_path / "one.svg").read_bytes()


@pytest.mark.slow
def test_sweep_plot_is_drawn_when_no_phase_has_two_trials(tmp_path: Path) -> None:
    assert draw_sweep(result_of(outcome(0, "a", {})), tmp_path / "one.svg").stat().st_size > 0


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({}, {RATE: 5e-4}, True),
        ({}, {RANK: 16, "adapter.alpha": 32}, True),
        ({}, {"train.epochs": 1.0, "train.steps": None}, True),
        ({}, {RANK: 8}, False),
        ({"train.steps": 5}, {"train.steps": 5, "train.epochs": 7.0}, True),
        ({}, {"train.seed": 1}, False),
        ({}, {"evaluate.limit": 7}, True),
    ],
)
def test_trials_share_a_training_key_only_if_they_train_identically(
    first: dict[str, Any], second: dict[str, Any], same: bool
) -> None:
    keys = [training_key(with_values(make_recipe().with_learning_rate(576), values)) for values in (first, second)]
    assert (keys[0] == keys[1]) is same


def test_trial_values_are_formatted_for_humans() -> None:
    assert describe({RATE: 2e-4, "train.steps": None, RANK: 8}) == "learning_rate 0.0002, rank 8"
