"""Tests the trials of a sweep, pruning, and the choice of the winner, including after a kill."""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import pytest
from optuna.storages import InMemoryStorage

from svc.errors import TrainingError
from tests.trainer.conftest import make_recipe
from tests.trainer.sweep.fake_trials import TOKENS, FakeTrials, Landscape
from trainer.recipe.recipe import Recipe
from trainer.sweep.outcome import Status, TrialComparison, TrialOutcome
from trainer.sweep.search import DROPOUT, EPOCHS, RANK, RATE, STEPS, TARGETS, Phase, Search
from trainer.sweep.trial_runner import Watch
from trainer.sweep.values import Values, training_key, with_values


def rate_of(recipe: Recipe) -> float:
    assert recipe.train.learning_rate is not None
    return recipe.train.learning_rate


def bowl(best: float) -> Landscape:
    """Return a held-out loss that depends only on the learning rate."""
    return lambda recipe: 0.3 * abs(math.log2(rate_of(recipe) / best))


class Sweep:
    """A search with fake trainings and real in-memory studies."""

    def __init__(self, recipe: Recipe, landscape: Landscape, *, width: int = 576, **fake: Any) -> None:
        self.usual_rate = recipe.usual_learning_rate(width)
        self.trials = FakeTrials(recipe.with_learning_rate(width), landscape, **fake)
        self.search = self._fresh()

    def _fresh(self) -> Search:
        trials = self.trials
        return Search(trials.recipe, self.usual_rate, TrialComparison(TOKENS), trials.start, InMemoryStorage())

    def run(self) -> TrialOutcome:
        return self.search.run()

    def again(self) -> TrialOutcome:
        """Run the search again, as the same command would in a new process."""
        self.search = self._fresh()
        return self.search.run()

    def of(self, phase: Phase) -> list[TrialOutcome]:
        return [trial for tried_in, trial in self.search.tried if tried_in is phase]


Make = Callable[..., Sweep]


@pytest.fixture
def make() -> Make:
    def make(landscape: Landscape, fake: Mapping[str, Any] | None = None, **sections: Any) -> Sweep:
        return Sweep(make_recipe(**sections), landscape, **(fake or {}))

    return make


def test_each_search_phase_starts_from_the_winner_of_the_previous_phase(make: Make) -> None:
    def landscape(recipe: Recipe) -> float:
        return bowl(1e-4)(recipe) + 8 / recipe.rank + 1 / recipe.train.epochs

    sweep = make(landscape)
    winner = sweep.run()
    assert winner.values == {EPOCHS: 5.0, STEPS: None, RATE: 1e-4, RANK: 128}
    assert [trial.values[RATE] for trial in sweep.of(Phase.LEARNING_RATE)] == [5e-4, 2e-4, 1e-4, 5e-5, 1e-5]
    assert [trial.values[RANK] for trial in sweep.of(Phase.RANK)] == [16, 8, 32, 64, 128]
    assert [trial.values[EPOCHS] for trial in sweep.of(Phase.EPOCHS)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("method", "highest"), [("lora", 5e-4), ("adalora", 1e-2), ("vera", 6e-2), ("full", 5e-5)])
def test_sweep_centers_learning_rates_on_the_default_for_the_training_method(
    make: Make, method: str, highest: float
) -> None:
    sweep = make(bowl(highest / 5), method=method)
    sweep.run()
    rates = [trial.values[RATE] for trial in sweep.of(Phase.LEARNING_RATE)]
    assert sorted(rates) == pytest.approx([highest / 50, highest / 10, highest / 5, highest / 2.5, highest])


def test_no_ranks_are_tried_for_full_fine_tuning(make: Make) -> None:
    sweep = make(bowl(1e-5), method="full")
    sweep.run()
    assert sweep.of(Phase.RANK) == []


def test_first_trial_of_each_phase_uses_the_values_of_the_recipe(make: Make) -> None:
    sweep = make(bowl(3e-4), train={"learning_rate": 3e-4}, adapter={"rank": 4})
    assert sweep.run().values == {}
    assert sweep.of(Phase.LEARNING_RATE)[0].values[RATE] == 3e-4
    assert sweep.of(Phase.RANK)[0].values[RANK] == 4


def test_higher_learning_rates_are_tried_when_the_highest_is_best(make: Make) -> None:
    sweep = make(bowl(1e-3))
    assert sweep.run().values[RATE] == 1e-3
    assert [trial.values[RATE] for trial in sweep.of(Phase.LEARNING_RATE)][5:] == [1e-3, 2e-3]


def test_lower_learning_rates_are_tried_when_the_lowest_is_best(make: Make) -> None:
    sweep = make(bowl(4e-6))
    assert sweep.run().values[RATE] == 5e-6
    assert [trial.values[RATE] for trial in sweep.of(Phase.LEARNING_RATE)][5:] == [5e-6, 2.5e-6]


def test_note_is_added_when_the_best_learning_rate_is_the_highest_tried(make: Make) -> None:
    sweep = make(bowl(1.0))
    assert sweep.run().values[RATE] == 8e-3
    assert any("the best train.learning_rate is the highest value tried" in note for note in sweep.search.notes)


def test_lower_learning_rates_are_tried_for_a_wider_base() -> None:
    sweep = Sweep(make_recipe(), bowl(4e-5), width=4096)
    assert sweep.run().values[RATE] == 3.8e-5
    rates = [trial.values[RATE] for trial in sweep.of(Phase.LEARNING_RATE)]
    assert rates == pytest.approx([1.9e-4, 7.6e-5, 3.8e-5, 1.9e-5, 3.8e-6])


def test_lower_ranks_are_tried_when_the_lowest_is_significantly_better(make: Make) -> None:
    sweep = make(lambda recipe: 0.1 * abs(recipe.rank - 4))
    assert sweep.run().values[RANK] == 4
    assert [trial.values[RANK] for trial in sweep.of(Phase.RANK)] == [16, 8, 32, 4, 2]


def test_no_further_ranks_are_tried_when_rank_makes_no_difference(make: Make) -> None:
    sweep = make(bowl(5e-4))
    sweep.run()
    assert [trial.values[RANK] for trial in sweep.of(Phase.RANK)] == [16, 8, 32]


def test_at_most_three_epochs_are_tried_unless_the_third_is_significantly_better(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrialComparison, "distinct", lambda self, first, second: abs(first.mean - second.mean) > 0.1)
    losses = {1.0: 1.0, 2.0: 0.5, 3.0: 0.45}
    sweep = make(lambda recipe: losses[recipe.train.epochs])
    assert sweep.run().values[EPOCHS] == 2
    assert [trial.values[EPOCHS] for trial in sweep.of(Phase.EPOCHS)] == [1, 2, 3]


def test_unchanged_recipe_wins_when_a_difference_may_be_due_to_chance(make: Make) -> None:
    """None of the values matters here, so the recipe wins unchanged."""
    assert make(lambda recipe: 1.0).run().values == {}


def test_sweep_winner_is_never_worse_than_the_unchanged_recipe(make: Make) -> None:
    """The recipe has two epochs, and its learning rate is right only for two epochs."""

    def landscape(recipe: Recipe) -> float:
        return 0.0 if recipe.train.epochs == 2 and rate_of(recipe) == 5e-4 else 2.0 + rate_of(recipe)

    assert make(landscape, train={"epochs": 2}).run().values == {}


def test_sweep_stops_increasing_the_number_of_epochs_when_an_increase_does_not_help(make: Make) -> None:
    sweep = make(lambda recipe: recipe.train.epochs)
    sweep.run()
    assert [trial.values[EPOCHS] for trial in sweep.of(Phase.EPOCHS)] == [1, 2]


def test_unchanged_recipe_is_run_as_a_trial_when_it_sets_the_number_of_steps(make: Make) -> None:
    sweep = make(lambda recipe: -1.0 if recipe.train.steps else 0.0, train={"steps": 7})
    assert sweep.run().values == {}


def test_additional_target_modules_are_tried_when_the_largest_rank_won(make: Make) -> None:
    def landscape(recipe: Recipe) -> float:
        return 10 / recipe.rank + (recipe.adapter.targets != "all-linear")

    sweep = make(landscape, adapter={"targets": "attention"})
    assert sweep.run().values[TARGETS] == "all-linear"


def test_additional_target_modules_are_not_tried_when_rank_made_no_difference(make: Make) -> None:
    sweep = make(bowl(5e-4), adapter={"targets": "attention"})
    sweep.run()
    assert sweep.of(Phase.TARGETS) == []
    assert any("adapters on more layers were not tried" in note for note in sweep.search.notes)


def test_dropout_is_tried_when_a_trial_overfits(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = make(lambda recipe: 1.0 - recipe.adapter.dropout)
    monkeypatch.setattr(TrialOutcome, "overfits", property(lambda self: True))
    assert sweep.run().values[DROPOUT] == 0.1


def test_dropout_is_not_tried_when_no_trial_overfits(make: Make) -> None:
    sweep = make(lambda recipe: 1.0 - recipe.adapter.dropout)
    sweep.run()
    assert sweep.of(Phase.DROPOUT) == []


def test_worse_trials_are_pruned_but_never_the_first_two(make: Make) -> None:
    sweep = make(bowl(5e-4))
    sweep.run()
    statuses = {trial.values[RATE]: trial.status for trial in sweep.of(Phase.LEARNING_RATE)}
    assert {rate for rate, status in statuses.items() if status is Status.PRUNED} == {1e-3, 1e-4, 5e-5, 1e-5}
    assert statuses[5e-4] is statuses[2e-4] is Status.COMPLETE


def test_exploding_loss_fails_only_the_affected_trial(make: Make) -> None:
    sweep = make(bowl(1e-4), {"diverges": lambda recipe: rate_of(recipe) > 1e-4})
    assert sweep.run().values[RATE] == 1e-4


def test_sweep_fails_when_no_trial_completes(make: Make) -> None:
    with pytest.raises(TrainingError, match="no trial completed: the loss is nan"):
        make(bowl(1e-4), {"diverges": lambda recipe: True}).run()


def test_identical_trials_of_two_phases_are_trained_only_once(make: Make) -> None:
    sweep = make(bowl(1e-4))
    sweep.run()
    rates = [values[RATE] for values in sweep.trials.made[1:] if values.get(RANK, 16) == 16 and values[EPOCHS] == 1]
    assert len(rates) == len(set(rates))
    assert [values for values in sweep.trials.made if values.get(RATE, 5e-4) == 5e-4] == [{}]  # the recipe's own values


class AtOnce:
    """Trials that train at the same time as others, and finish when their result is asked for.

    Attributes:
        most: largest number of trainings that were running at the same time.
        last_first: whether all running trials finish before the result of the oldest one is given, the last one first.
    """

    def __init__(self, trials: FakeTrials, *, last_first: bool) -> None:
        self.trials = trials
        self.most = 0
        self._last_first = last_first
        self._running: dict[str, _Running] = {}

    def start(self, number: int, values: Values, watch: Watch) -> Future[TrialOutcome]:
        key = training_key(with_values(self.trials.recipe, values))
        if key not in self._running:
            self._running[key] = _Running(self, values, watch)
        self.most = max(self.most, sum(not each.done() for each in self._running.values()))
        return self._running[key]

    def finish(self, wanted: "_Running") -> None:
        waiting = [each for each in self._running.values() if not each.done()]
        for each in reversed(waiting) if self._last_first else [wanted]:
            each.set_result(self.trials.run(each.values, each.watch))


class _Running(Future[TrialOutcome]):
    def __init__(self, trials: AtOnce, values: Values, watch: Watch) -> None:
        super().__init__()
        self.trials, self.values, self.watch = trials, values, watch

    def result(self, timeout: float | None = None) -> TrialOutcome:
        if not self.done():
            self.trials.finish(self)
        return super().result()


def at_once(parallel: int, landscape: Landscape, *, last_first: bool = False, **sections: Any) -> tuple[Search, AtOnce]:
    """Run a search with several trials at the same time."""
    recipe = make_recipe(**sections)
    trials = AtOnce(FakeTrials(recipe.with_learning_rate(576), landscape), last_first=last_first)
    usual_rate, compare = recipe.usual_learning_rate(576), TrialComparison(TOKENS)
    search = Search(trials.trials.recipe, usual_rate, compare, trials.start, InMemoryStorage(), parallel=parallel)
    search.run()
    return search, trials


class Killed(BaseException):
    """An exception that no code catches."""


SPACES: list[dict[str, Any]] = [
    {},
    {
        "sweep": {
            "space": {"train.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, RANK: {"low": 2, "high": 64}}
        }
    },
    {"sweep": {"space": {"adapter.rank": [4, 8], "train.batch_size": [4, 8, 16]}}},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "kills"),
    [(SPACES[0], (1,)), (SPACES[0], (2, 3, 8)), (SPACES[1], (4,)), (SPACES[2], (2, 3, 8))],
    ids=["phases, first", "phases, three", "ranges", "lists"],
)
def test_killed_sweep_resumes_with_the_same_trials(sections: dict[str, Any], kills: tuple[int, ...]) -> None:
    def landscape(recipe: Recipe) -> float:
        return bowl(1e-4)(recipe) + 8 / recipe.rank + recipe.train.batch_size / 10

    whole = Sweep(make_recipe(**sections), landscape)
    won = whole.run()
    killed = Sweep(make_recipe(**sections), landscape, broken=dict.fromkeys(kills, Killed()))
    for attempt in range(len(kills)):
        with pytest.raises(Killed):
            killed.run() if attempt == 0 else killed.again()
    assert killed.again().values == won.values
    assert killed.search.tried == whole.search.tried
    completed = [values for place, values in enumerate(killed.trials.made, start=1) if place not in kills]
    assert completed == whole.trials.made


def test_repeating_a_finished_sweep_runs_no_training(make: Make) -> None:
    sweep = make(bowl(1e-4))
    won = sweep.run()
    before = len(sweep.trials.made)
    assert sweep.again().values == won.values
    assert len(sweep.trials.made) == before


def test_every_combination_is_tried_when_the_search_space_has_only_lists(make: Make) -> None:
    sweep = make(bowl(1e-4), sweep={"space": {RATE: [1e-4, 2e-4], RANK: [4, 8]}})
    assert sweep.run().values == {RATE: 1e-4, RANK: 4}
    assert len(sweep.of(Phase.SPACE)) == 4


def test_recipe_sets_the_number_of_trials_for_a_search_space_with_ranges(make: Make) -> None:
    space = {RATE: {"low": 1e-5, "high": 1e-2, "log": True}, "adapter.rank": {"low": 2, "high": 64}}
    sweep = make(bowl(1e-4), sweep={"space": space, "trials": 7})
    sweep.run()
    trials = sweep.of(Phase.SPACE)
    assert len(trials) == 7
    assert all(1e-5 <= trial.values[RATE] <= 1e-2 and isinstance(trial.values[RANK], int) for trial in trials)


def test_sweep_ends_after_its_time_limit(make: Make) -> None:
    sweep = make(bowl(1e-4), sweep={"seconds": 2.5})
    sweep.run()
    assert len(sweep.trials.made) == 3
    assert any("sweep.seconds" in note for note in sweep.search.notes)


def test_unchanged_recipe_wins_when_its_own_trial_uses_up_the_time_limit(make: Make) -> None:
    sweep = make(bowl(1e-4), sweep={"seconds": 0.5}, adapter={"targets": "attention"})
    assert sweep.run().values == {}
    assert len(sweep.search.tried) == 1


RANGES: dict[str, Any] = {
    "sweep": {"space": {"train.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, RANK: {"low": 2, "high": 64}}}
}


def ranges(recipe: Recipe) -> float:
    return bowl(1e-4)(recipe) + 8 / recipe.rank


@pytest.mark.parametrize("parallel", [2, 3])
def test_number_of_concurrent_trials_equals_the_configured_parallelism(parallel: int) -> None:
    assert at_once(parallel, bowl(1e-4))[1].most == parallel


def test_equivalent_trials_started_concurrently_share_one_training_run() -> None:
    search, trials = at_once(3, bowl(1e-4))
    assert [trial.values for _, trial in search.tried[:2]] == [{}, {EPOCHS: 1.0, STEPS: None, RATE: 5e-4}]
    assert [values for values in trials.trials.made if values.get(RATE, 5e-4) == 5e-4] == [{}]


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, RANGES], ids=["phases", "ranges"])
def test_sweep_result_does_not_depend_on_which_trial_finishes_first(sections: dict[str, Any]) -> None:
    first, last = (at_once(3, ranges, last_first=last_first, **sections)[0] for last_first in (False, True))
    assert first.tried == last.tried


def test_sweep_phases_choose_the_same_values_when_trials_run_concurrently(make: Make) -> None:
    sweep = make(ranges)
    sweep.run()
    search, _ = at_once(3, ranges)

    def complete(tried: list[tuple[Phase, TrialOutcome]]) -> list[dict[str, Any]]:
        return [trial.values for phase, trial in tried if phase is Phase.EPOCHS]

    assert complete(search.tried) == complete(sweep.search.tried)


def test_pruning_ignores_trials_that_were_still_running_when_the_pruned_trial_started() -> None:
    space: dict[str, Any] = {"sweep": {"space": {RATE: [5e-4, 4e-4, 3e-4, 2e-4, 1e-4]}, "finalists": 0}}
    search, _ = at_once(3, bowl(5e-4), **space)
    statuses = [trial.status for phase, trial in search.tried if phase is Phase.SPACE]
    assert statuses == [Status.COMPLETE] * 4 + [Status.PRUNED]  # two of them had finished when the fifth started


@pytest.mark.slow
def test_sampler_does_not_repeat_the_values_of_running_trials() -> None:
    search, _ = at_once(6, ranges, **RANGES)
    rates = [trial.values[RATE] for phase, trial in search.tried if phase is Phase.SPACE]
    assert len(set(rates)) == len(rates)
