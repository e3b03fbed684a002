"""A sweep from its first trial to its winner, and what is kept of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from svc.disk import write_whole
from svc.evaluation.estimate import Estimate
from svc.terminal import console
from trainer.recipe.sections import Recipe
from trainer.sweep.outcome import Comparison, Outcome, Status
from trainer.sweep.search import Plan, Search, Tried, runner_up
from trainer.sweep.space import Phase, check_space
from trainer.sweep.study import PhaseStudy
from trainer.sweep.trial import answer_lengths
from trainer.sweep.values import Values, describe, with_values
from trainer.sweep.workplace import Workplace

RESULT_FILE, WINNER_FILE = "result.json", "winner.yaml"


class Line(BaseModel):
    """One trial in the table; of two phases that share a training, each has one.

    Attributes:
        difference: held-out loss minus the winner's, on the same examples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: Phase
    values: dict[str, Any]
    status: Status
    loss: Estimate | None
    difference: Estimate | None
    steps: int
    seconds: float
    why: str | None = None


class SweepResult(BaseModel):
    """What a sweep has found.

    Attributes:
        winner: what it changes in the recipe; nothing where the recipe as it is cannot be told apart from the best.
        loss: the winner's; as those of `base` and `recipe`, nats an answer token.
        recipe: of the recipe as it is; None where that was not completed.
        runner_up: what the best of the others changes; None where there is none.
        difference: held-out loss of the runner-up minus the winner's.
        warning: where the two cannot be told apart.
        seconds: of all trainings.
        heldout: examples that trials are judged by.
        notes: why a phase was left out, or gone beyond.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    winner: dict[str, Any]
    loss: Estimate
    base: Estimate
    recipe: Estimate | None
    runner_up: dict[str, Any] | None
    difference: Estimate | None
    warning: str | None
    seconds: float
    heldout: int
    notes: tuple[str, ...]
    trials: tuple[Line, ...]


@dataclass
class Clock:
    """Foretells how long the rest takes, from what an epoch has taken."""

    say: Callable[[str], None]
    _seconds: float = 0.0
    _epochs: float = 0.0
    _known: set[str] = field(default_factory=set)

    def begin(self, recipe: Recipe, phase: Phase, values: Values, plan: Plan) -> None:
        """Says what comes, and how long it and the rest will take."""
        trials = f"{len(plan.epochs)} trials" if len(plan.epochs) > 1 else "the last trial"
        left = f", about {sum(plan.epochs) * self._seconds / self._epochs / 60:.0f} min left" if self._epochs else ""
        self.say(f"[bold]{phase}[/bold]: {describe(values)} ({trials} to go{left})")

    def end(self, recipe: Recipe, tried: Tried) -> None:
        """Says what was found."""
        outcome = tried.outcome
        if outcome.status is Status.COMPLETE and outcome.key not in self._known:
            self._known.add(outcome.key)
            self._seconds += outcome.seconds
            self._epochs += with_values(recipe, outcome.values).train.epochs
        self.say(f"  held-out loss {outcome.loss}" if outcome.loss else f"  {outcome.status}: {outcome.why}")


def run_sweep(place: Workplace) -> SweepResult:
    """Tries what is left to try, and says what is best; the caller holds the place.

    Raises:
        InterruptedRunError: a signal came; the same command goes on.
        RecipeError: the recipe's space has a value that its key does not take.
        TrainingError: no trial was completed.
    """
    check_space(place.recipe)
    recipe, storage = place.recipe, f"sqlite:///{place.folder.absolute() / 'study.db'}"
    base, comparison = place.base_loss(), Comparison(answer_lengths(place.data))
    console.print(f"  held-out loss of the base: {base}, {len(place.data.judged)} examples")
    clock = Clock(partial(console.print, soft_wrap=True))
    search = Search(
        recipe,
        comparison,
        lambda phase, space: PhaseStudy(storage, phase, space, place.trials.run),
        partial(clock.begin, recipe),
        partial(clock.end, recipe),
    )
    winner = search.run()
    result = summarize(search, winner, base, len(place.data.judged))
    write_whole(place.folder / RESULT_FILE, result.model_dump_json(indent=1).encode("utf-8"))
    write_whole(place.folder / WINNER_FILE, recipe_text(with_values(recipe, winner.values)).encode("utf-8"))
    return result


def summarize(search: Search, winner: Outcome, base: Estimate, heldout: int) -> SweepResult:
    """Puts the result together."""
    second, compare = runner_up(search.tried, winner), search.comparison.difference
    as_it_is = next((one.outcome for one in search.tried if one.phase is Phase.RECIPE), None)
    difference = compare(winner, second) if second else None
    warning = None
    if second and difference and not search.comparison.distinct(winner, second):
        warning = (
            f"cannot be told apart from {describe(second.values)}: held-out loss differs by {difference}, "
            "an interval with 0 in it; more held-out examples would tell"
        )
    lines = [
        Line(
            phase=one.phase,
            values=one.outcome.values,
            status=one.outcome.status,
            loss=one.outcome.loss,
            difference=compare(winner, one.outcome) if one.outcome.loss else None,
            steps=one.outcome.steps,
            seconds=round(one.outcome.seconds, 1),
            why=one.outcome.why,
        )
        for one in search.tried
    ]
    assert winner.loss is not None  # noqa: S101 - only a trial that was completed is chosen
    return SweepResult(
        winner=winner.values,
        loss=winner.loss,
        base=base,
        recipe=as_it_is.loss if as_it_is else None,
        runner_up=second.values if second else None,
        difference=difference,
        warning=warning,
        seconds=round(sum({one.outcome.key: one.outcome.seconds for one in search.tried}.values()), 1),
        heldout=heldout,
        notes=tuple(search.notes),
        trials=tuple(lines),
    )


def recipe_text(recipe: Recipe) -> str:
    """A whole recipe as YAML, with absolute paths."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)


def settings_of_winner(result: SweepResult) -> list[str]:
    """As `--set` takes them: values in YAML, in which 5e-05 is a text."""
    return [f"{key}={yaml.safe_dump(value).splitlines()[0]}" for key, value in result.winner.items()]
