"""Determines which values a sweep tries, and in what order. If the recipe defines a search space, that space is
searched. Otherwise, the sweep runs in phases, such as learning rate and rank.

Each phase has an Optuna study, which proposes values from the recipe's space and decides which trials
are pruned. A resumed sweep repeats all calls to Optuna with new studies. Because the results of its
trials are stored and the sampler is seeded, all decisions are the same. This module is independent of
how trials are trained.

Several trials may run at the same time. Their results are reported to Optuna in the order in which the trials started,
and only when a new trial needs a free slot. A trial is pruned by comparison with the results that had been reported
when the trial started. The decisions therefore depend on the number of trials that may run at the same time, but not on
the order in which trials finish.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from svc.terminal import console
from trainer.recipe.adapter import MAX_RANK, AdapterType
from trainer.recipe.recipe import Recipe
from trainer.recipe.sweep import Between, Sweep
from trainer.recipe.targets import Targets
from trainer.sweep.outcome import TrialComparison, TrialOutcome
from trainer.sweep.trial_runner import Watch
from trainer.sweep.values import Values, describe, show, with_values

RATE, RANK, EPOCHS, STEPS = "train.learning_rate", "adapter.rank", "train.epochs", "train.steps"
TARGETS, DROPOUT = "adapter.targets", "adapter.dropout"
_RATES = (0.02, 0.1, 0.2, 0.4, 1.0)
"""Learning rates to try, as multiples of the default. For LoRA on a base of width 576, they are 1e-5 to
5e-4."""
_RANKS = (8, 16, 32)
_EPOCHS = (1.0, 2.0, 3.0)
_MAX_BEYOND_RATES, _MAX_BEYOND_RANKS = 4, 2
"""Maximum number of learning rates and of ranks to try beyond the lowest or the highest value. Each is half
or twice the previous one."""
_DROPOUTS = (0.05, 0.1)
_UNPRUNED = 2
"""Number of trials in a phase that must finish before any trial is pruned."""
_RANDOM = 5
"""Number of random trials in the recipe's search space before the sampler starts to use results."""

Space = Mapping[str, Sequence[Any] | Between]
StartTrial = Callable[[int, Values, Watch], "Future[TrialOutcome]"]
"""Function that starts the trial with the given number and values. Trials that require the same training share
a future."""


class Phase(StrEnum):
    """Phase of a sweep. Each phase starts from the values that the previous phase chose."""

    LEARNING_RATE = "learning rate"
    RANK = "rank"
    EPOCHS = "epochs"
    TARGETS = "targets"
    DROPOUT = "dropout"
    RECIPE = "the recipe as it is"
    SPACE = "own space"


@dataclass(frozen=True, slots=True)
class _Study:
    """One phase of a sweep, with its Optuna study.

    Attributes:
        fixed: values shared by all trials.
        space: the values to search.
    """

    phase: Phase
    study: optuna.Study
    fixed: Values
    space: dict[str, BaseDistribution]


@dataclass(eq=False, slots=True)
class _Trial:
    """A trial that was started.

    Attributes:
        trial: the trial in Optuna's study.
        result: future of the trial's training.
        outcome: the trial's outcome, or None if it has not been reported to Optuna yet.
    """

    number: int
    study: _Study
    trial: optuna.Trial
    values: Values
    result: "Future[TrialOutcome]"
    outcome: TrialOutcome | None = None


@dataclass
class Search:
    """Runs the search of one sweep.

    Args:
        recipe: the recipe as loaded.
        usual_rate: default learning rate for the recipe's method and base.
        start_trial: starts training with the given values, unless a trial with these values has already been trained.
        storage: Optuna storage, or its URL.
        parallel: maximum number of trials that train at the same time.

    Attributes:
        tried: trials so far, in order. The same trial may be part of two phases.
        notes: sentences that explain why a phase was skipped or extended.
    """

    recipe: Recipe
    usual_rate: float
    comparison: TrialComparison
    start_trial: StartTrial
    storage: str | BaseStorage
    tried: list[tuple[Phase, TrialOutcome]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parallel: int = 1
    _running: deque[_Trial] = field(default_factory=deque)

    def run(self) -> TrialOutcome:
        """Run all trials and return the winning one. The first trial uses the unchanged recipe and is never pruned.

        Raises:
            TrainingError: a phase ended without a completed trial.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        unchanged = self._start(self._open(Phase.RECIPE, {}, {}), {})
        sweep = self.recipe.sweep
        if sweep.space is None:
            best = [self._phases(unchanged)]
        else:
            study = self._open(Phase.SPACE, {}, sweep.space)
            trials = self._trials(study, _combinations(sweep.space, sweep.trials))
            best = sorted(trials, key=lambda trial: trial.mean)[:1]
        return self.comparison.choose([self._outcome(unchanged), *best])

    def _phases(self, unchanged: _Trial) -> TrialOutcome:
        ranks = possible_ranks(self.recipe)
        best = self._learning_rate() or self._outcome(unchanged)
        if ranks:
            best = self._rank(best, ranks)
        best = self._epochs(best)
        if ranks:
            best = self._dropout(self._targets(best, ranks[-1]))
        return best

    def _learning_rate(self) -> TrialOutcome | None:
        """Try learning rates, beginning with those closest to the recipe's own rate. Among indistinguishable results,
        the recipe's rate is preferred, followed by the rate with the lowest loss, because all rates cost the same.
        Return None if there was no time for any trial.
        """
        own = self.recipe.train.learning_rate or self.usual_rate
        rates = sorted({float(f"{rate * self.usual_rate:.3g}") for rate in _RATES} | {own})
        order = sorted(rates, key=lambda rate: abs(math.log(rate / own)))
        lower = [float(f"{rates[0] / 2**step:.3g}") for step in range(1, _MAX_BEYOND_RATES + 1)]
        higher = [float(f"{rates[-1] * 2**step:.3g}") for step in range(1, _MAX_BEYOND_RATES + 1)]
        fixed = {EPOCHS: 1.0, STEPS: None}
        return self._outwards(Phase.LEARNING_RATE, fixed, RATE, order, lower, higher, lambda trial: trial.mean)

    def _rank(self, best: TrialOutcome, ranks: Sequence[int]) -> TrialOutcome:
        """Try different ranks. Among indistinguishable results, the recipe's own rank is preferred, followed by the
        lowest rank.
        """
        order = sorted(ranks, key=lambda rank: rank != self.recipe.rank)
        lower = [rank for step in range(1, _MAX_BEYOND_RANKS + 1) if (rank := ranks[0] // 2**step)]
        higher = [rank for step in range(1, _MAX_BEYOND_RANKS + 1) if (rank := ranks[-1] * 2**step) <= MAX_RANK]
        phase = Phase.RANK
        chosen = self._outwards(phase, best.values, RANK, order, lower, higher, lambda trial: trial.values[RANK])
        return chosen or best

    def _outwards(
        self,
        phase: Phase,
        fixed: Values,
        key: str,
        order: Sequence[float],
        lower: Sequence[float],
        higher: Sequence[float],
        preference: Callable[[TrialOutcome], float],
    ) -> TrialOutcome | None:
        """Try values in the given order. Continue with higher values while the highest value tried is the best, and
        with lower values while the lowest value tried is the best.

        Args:
            order: values to try, starting with the recipe's own value.
            lower, higher: further values to try, nearest first.
            preference: sort key for trials that do not differ significantly. The recipe's own value is preferred,
                followed by the trial with the smallest key.

        Returns:
            The chosen trial, or None if there was no time for any trial.
        """
        study = self._open(phase, fixed, {key: [*order, *lower, *higher]})
        trials = self._trials(study, [{key: value} for value in order])
        if not trials:
            return None

        def choose() -> TrialOutcome:
            return self.comparison.choose([*trials[:1], *sorted(trials[1:], key=preference)])

        for beyond, edge, name in ((higher, max, "highest"), (lower, min, "lowest")):
            for value in beyond:
                best = choose().values[key]
                if best != edge(trial.values[key] for trial in trials):
                    break
                if not (more := self._trials(study, [{key: value}])):
                    return choose()
                trials += more
                self.notes.append(
                    f"{key} {show(value)} was tried because the {name} value so far, {show(best)}, was the best"
                )
            if beyond and choose().values[key] == beyond[-1]:
                self.notes.append(f"the best {key} is the {name} value tried: set it in the recipe and sweep again")
        return choose()

    def _epochs(self, best: TrialOutcome) -> TrialOutcome:
        """Try one epoch, then more epochs as long as each increase lowers held-out loss. More epochs
        than the largest planned number are tried only while the loss falls significantly.
        """
        own = None if self.recipe.train.steps else self.recipe.train.epochs
        lengths = sorted({*_EPOCHS, own or 1.0})
        most = lengths[-1]
        lengths += [most + 1, most + 2]
        study = self._open(Phase.EPOCHS, best.values, {EPOCHS: lengths})
        trials: list[TrialOutcome] = []
        for length in lengths:  # one after the other: most of the time, the longest are not needed
            if not (more := self._trials(study, [{EPOCHS: length}])):
                break
            (trial,) = more
            trials.append(trial)
            before = trials[-2] if len(trials) > 1 else None
            if before and trial.mean >= before.mean:
                break
            if before and before.loss and trial.values[EPOCHS] >= most and not self.comparison.distinct(before, trial):
                break
        trials.sort(key=lambda trial: trial.values[EPOCHS] != own)  # of the others, the shortest stays first
        return self.comparison.choose(trials or [best])

    def _targets(self, best: TrialOutcome, largest: int) -> TrialOutcome:
        """If the best trial so far has the largest rank, also run a trial with adapters on all linear layers, unless
        the recipe targets them all already. Return the trial that is chosen.
        """
        if self.recipe.adapter.targets is Targets.ALL_LINEAR:
            return best
        rank = with_values(self.recipe, best.values).rank
        if rank < largest:
            self.notes.append(f"adapters on more layers were not tried: rank {largest} is no better than {rank}")
            return best
        study = self._open(Phase.TARGETS, best.values, {TARGETS: [Targets.ALL_LINEAR.value]})
        trials = self._trials(study, [{TARGETS: Targets.ALL_LINEAR.value}])
        return self.comparison.choose([best, *trials])

    def _dropout(self, best: TrialOutcome) -> TrialOutcome:
        """Try dropout if the best or the longest training run overfits."""
        longest = [best, *(trial for phase, trial in self.tried if phase is Phase.EPOCHS)][-1]
        if not (best.overfits or longest.overfits):
            self.notes.append("dropout was not tried: no trial overfitted significantly")
            return best
        targets = {TARGETS: best.values[TARGETS]} if TARGETS in best.values else {}
        study = self._open(Phase.DROPOUT, {**longest.values, **targets}, {DROPOUT: _DROPOUTS})
        trials = self._trials(study, [{DROPOUT: dropout} for dropout in _DROPOUTS])
        return self.comparison.choose([best, *trials])

    def _open(self, phase: Phase, fixed: Values, space: Space) -> _Study:
        """Create the Optuna study for a phase.

        Args:
            fixed: values shared by all trials.
        """
        study = optuna.create_study(
            storage=self.storage,
            study_name=phase,
            sampler=optuna.samplers.TPESampler(n_startup_trials=_RANDOM, seed=0, constant_liar=True),
            pruner=_pruner(),
        )
        return _Study(phase, study, fixed, {key: _distribution(values) for key, values in space.items()})

    def _trials(self, study: _Study, combinations: Iterable[dict[str, Any] | None]) -> list[TrialOutcome]:
        """Run trials of a phase, at most `parallel` at the same time. No trial is started once training has taken
        `sweep.seconds` in total.

        Args:
            combinations: the values of each trial, or None for a trial whose values the sampler chooses.
        """
        trials = list[_Trial]()
        for chosen in combinations:
            self._make_room()
            if self._is_late():
                break
            trials.append(self._start(study, chosen))
        return [self._outcome(trial) for trial in trials]

    def _make_room(self) -> None:
        """Wait until another trial may start training. Trials that share a training run are counted as one."""
        while len({id(trial.result) for trial in self._running}) >= self.parallel:
            self._finish_oldest()

    def _outcome(self, trial: _Trial) -> TrialOutcome:
        """Wait for a trial, and return its outcome."""
        while trial.outcome is None:
            self._finish_oldest()
        return trial.outcome

    def _start(self, study: _Study, chosen: dict[str, Any] | None) -> _Trial:
        if chosen is not None:
            study.study.enqueue_trial(chosen)
        trial, number = study.study.ask(study.space), len(self.tried) + len(self._running) + 1
        values = {**study.fixed, **trial.params}
        console.print(f"[bold]{study.phase}[/bold], trial {number}: {describe(values)}", soft_wrap=True)
        started = _Trial(number, study, trial, values, self.start_trial(number, values, _Pruning(study.study)))
        self._running.append(started)
        return started

    def _finish_oldest(self) -> None:
        """Wait for the running trial that was started first, and report its outcome to Optuna."""
        oldest = self._running[0]
        # An earlier trial may have the same outcome, if both trials' values result in the same training.
        outcome = oldest.result.result().model_copy(update={"values": dict(oldest.values)})
        result = f"held-out loss {outcome.loss}" if outcome.loss else f"{outcome.status}: {outcome.why}"
        console.print(f"  trial {oldest.number}: {result}, {outcome.seconds:.0f} s", soft_wrap=True)
        for step, loss in outcome.watched.items():
            oldest.trial.report(loss, step)
        value = outcome.mean if outcome.loss else None
        oldest.study.study.tell(oldest.trial, value, TrialState[outcome.status.name])
        self.tried.append((oldest.study.phase, outcome))
        self._running.popleft()
        oldest.outcome = outcome

    def _is_late(self) -> bool:
        limit = self.recipe.sweep.seconds
        if limit is None or self.seconds < limit:
            return False
        note = f"trials were skipped because sweep.seconds ({limit:g}) had passed"
        self.notes += [] if note in self.notes else [note]
        return True

    @property
    def seconds(self) -> float:
        """Total training time of all trials, in seconds."""
        return sum({trial.key: trial.seconds for _, trial in self.tried}.values())


def possible_ranks(recipe: Recipe) -> list[int]:
    """Return the ranks to try: the usual LoRA ranks, scaled to the method's default, plus the recipe's rank.
    The list is empty for full fine-tuning.
    """
    if recipe.adapter_type is None:
        return []
    scale = 16 if recipe.adapter_type is AdapterType.VERA else 1
    ranks = {rank * scale for rank in _RANKS} | {recipe.rank}
    return sorted(ranks)


def samples_values(sweep: Sweep) -> bool:
    """Return whether a sampler chooses the values of trials. It does if the search space has too many combinations to
    try them all.
    """
    return sweep.space is not None and None in _combinations(sweep.space, sweep.trials)


def _combinations(space: Space, most: int) -> Sequence[dict[str, Any] | None]:
    """Return every combination of values in a search space. If there are more than `most`, or the space contains a
    range, return a list of `most` Nones, one per trial; the sampler then chooses the values.
    """
    lists = [values for values in space.values() if not isinstance(values, Between)]
    if len(lists) < len(space) or math.prod(map(len, lists)) > most:
        return [None] * most
    return [dict(zip(space, chosen, strict=True)) for chosen in itertools.product(*lists)]


def _distribution(values: Sequence[Any] | Between) -> BaseDistribution:
    if not isinstance(values, Between):
        return CategoricalDistribution(values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _pruner() -> optuna.pruners.BasePruner:
    return optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED)


class _Pruning:
    """Decides after each measurement of a trial whether to prune the trial. It may be called from any thread.

    Args:
        study: study of the trial. The trial is compared with the trials that were complete when this object was
            created.
    """

    def __init__(self, study: optuna.Study) -> None:
        self._earlier = optuna.create_study()
        self._earlier.add_trials(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))
        self._losses: dict[int, float] = {}

    def __call__(self, step: int, loss: float) -> None:
        """Raise TrialPruned if the trial's lowest loss so far is above the earlier trials' median loss at this step."""
        self._losses[step] = loss
        trial = optuna.trial.create_trial(state=TrialState.RUNNING, intermediate_values=self._losses)
        if _pruner().prune(self._earlier, trial):
            raise optuna.TrialPruned(f"at step {step} with loss {loss:.3f}")
