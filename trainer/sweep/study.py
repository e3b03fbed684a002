"""Optuna's studies of a sweep, one for each phase, in one SQLite file: what was tried, and when a trial is given up.

A trial that was cut off stays behind there as failed, and is tried again with the same values; what was measured of it
counts again. So a sweep that was killed makes the decisions of one that was not. Imports Optuna when it is used.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainer.sweep.outcome import Outcome, Pruned, Status
from trainer.sweep.space import distributions
from trainer.sweep.values import Values

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

Watch = Callable[[int, float], None]
"""Takes a step and the held-out loss there; raises `Pruned`."""
Objective = Callable[[Values, Watch], Outcome]
"""Makes a trial, or finds what it gave before."""

_UNPRUNED = 2
"""Trials of a phase that are finished before the first one is given up."""
_RANDOM = 5
"""Trials of an own space that are drawn at random before the others are chosen by them."""
_KEY, _WHY = "key", "why"


class PhaseStudy:
    """The trials of one phase.

    Args:
        storage: URL of the database, or what Optuna has in its place.
        space: all that may be tried in this phase; does not change while the sweep lives.
    """

    def __init__(
        self, storage: "str | BaseStorage", phase: str, space: Mapping[str, Any], objective: Objective
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._objective = distributions(space), objective
        pruner = optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED)
        self._study: Study = optuna.create_study(
            storage=storage, study_name=phase, direction="minimize", pruner=pruner, load_if_exists=True
        )
        for trial in self._study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):  # of a process that was killed
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def attempt(self, chosen: Values, values: Values) -> Outcome:
        """Makes a trial, unless it was made before.

        Args:
            chosen: this phase's keys.
            values: all that the trial changes in the recipe.
        """
        from optuna.trial import TrialState

        if any(trial.params == dict(chosen) for trial in self._ended()):
            return self._objective(values, lambda step, loss: None)
        if not self._study.get_trials(states=(TrialState.WAITING,)):  # one is there if a kill came just before `ask`
            self._study.enqueue_trial(dict(chosen))
        return self._try(self._study.ask(self._space), values)

    def search(self) -> Outcome:
        """Makes the next trial of a space, with values that those before propose: the same ones after a kill."""
        import optuna

        # A sampler looks at trials that have ended, and draws by its seed: so it proposes the same again.
        seed = len(self._ended())
        self._study.sampler = optuna.samplers.TPESampler(n_startup_trials=_RANDOM, seed=seed, constant_liar=False)
        trial = self._study.ask(self._space)
        return self._try(trial, trial.params)

    def found(self) -> list[Outcome]:
        """The trials of a search that need not be made again."""
        return [self._objective(trial.params, lambda step, loss: None) for trial in self._ended()]

    def _ended(self) -> "list[FrozenTrial]":
        return [trial for trial in self._study.get_trials() if trial.state.is_finished() and not _is_cut_off(trial)]

    def _cut_off(self) -> "list[FrozenTrial]":
        return [trial for trial in self._study.get_trials() if _is_cut_off(trial)]

    def _try(self, trial: "Trial", values: Values) -> Outcome:
        from optuna.trial import TrialState

        reported: set[int] = set()

        def watch(step: int, loss: float) -> None:
            if step not in reported:
                reported.add(step)
                trial.report(loss, step)
            if trial.should_prune():
                raise Pruned(f"at step {step}, where it had {loss:.3f}")

        before = [one for one in self._cut_off() if one.params == trial.params]
        for step, loss in (before[-1].intermediate_values if before else {}).items():
            reported.add(step)
            trial.report(loss, step)
        outcome = self._objective(values, watch)
        for point in outcome.points:  # of one that was trained for an earlier phase
            if point.heldout_loss is not None and point.step not in reported:
                trial.report(point.heldout_loss, point.step)
        trial.set_user_attr(_KEY, outcome.key)
        if outcome.why:
            trial.set_user_attr(_WHY, outcome.why)
        match outcome.status:
            case Status.COMPLETE:
                self._study.tell(trial, outcome.mean)
            case Status.PRUNED:
                self._study.tell(trial, state=TrialState.PRUNED)
            case Status.FAILED:
                self._study.tell(trial, state=TrialState.FAIL)
        return outcome


def _is_cut_off(trial: "FrozenTrial") -> bool:
    """Whether nobody knows what it would have given; one whose loss exploded has said why."""
    return trial.state.name == "FAIL" and _KEY not in trial.user_attrs
