"""Fake trials whose held-out loss is a function of their values, with a different level for each example."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from optuna import TrialPruned

from svc.evaluation.intervals import mean
from trainer.recipe.recipe import Recipe
from trainer.sweep.outcome import Status, TrialOutcome
from trainer.sweep.trial_runner import Watch
from trainer.sweep.values import Values, training_key, with_values

LEVELS = (0.2, 0.5, 0.9, 1.4, 0.7, 0.3, 1.1, 0.8)
"""Loss level of each held-out example."""
TOKENS = (1,) * len(LEVELS)

Landscape = Callable[[Recipe], float]


def outcome(
    loss: float, key: str = "", values: Values | None = None, each: Sequence[float] | None = None, **more: Any
) -> TrialOutcome:
    """Return a complete outcome. Its loss differs by the same amount on every example, unless `each` is given."""
    losses = tuple(each) if each else tuple(level + loss for level in LEVELS)
    complete = {"status": Status.COMPLETE, "loss": mean(losses), "heldout_each": losses, "steps": 3, "seconds": 1.0}
    return TrialOutcome(**{"key": key, "values": dict(values or {}), **complete, **more})


@dataclass
class FakeTrials:
    """Replaces the training runs of a trial runner.

    Attributes:
        made: values of each training, in order.
        broken: exceptions raised in the middle of a training, by its position.
        diverges: values with which the loss explodes.
    """

    recipe: Recipe
    landscape: Landscape
    made: list[dict[str, Any]] = field(default_factory=list)
    broken: Mapping[int, BaseException] = field(default_factory=dict)
    diverges: Callable[[Recipe], bool] = lambda recipe: False
    known: dict[str, TrialOutcome] = field(default_factory=dict)

    def start(self, number: int, values: Values, watch: Watch) -> "Future[TrialOutcome]":
        """Run a trial, as on this machine, where it has finished when this method returns."""
        done = Future[TrialOutcome]()
        done.set_result(self.run(values, watch))
        return done

    def run(self, values: Values, watch: Watch) -> TrialOutcome:
        """Run a trial, or return its outcome if it is already stored."""
        recipe = with_values(self.recipe, values)
        key = training_key(recipe)
        if key not in self.known:
            self.known[key] = self._train(recipe, key, values, watch)
        return self.known[key].model_copy(update={"values": dict(values)})

    def _train(self, recipe: Recipe, key: str, values: Values, watch: Watch) -> TrialOutcome:
        self.made.append(dict(values))
        loss = self.landscape(recipe)
        if self.diverges(recipe):
            return TrialOutcome(key=key, values=dict(values), status=Status.FAIL, why="the loss is nan")
        watched: dict[int, float] = {}
        try:
            for step in (1, 2):
                watched[step] = loss + 1.5 - step / 2
                try:
                    watch(step, watched[step])
                finally:
                    if step == 1 and (broken := self.broken.get(len(self.made))):
                        raise broken
        except TrialPruned as pruned:
            return TrialOutcome(key=key, values=dict(values), status=Status.PRUNED, why=str(pruned), watched=watched)
        return outcome(loss, key, values, watched=watched)
