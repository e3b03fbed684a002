"""The order in which a sweep tries: phase by phase, or through the recipe's own space.

Everything follows from outcomes, so that a sweep that is run again finds its way through what is done. Knows nothing of
training, of Optuna's files or of a screen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from svc.errors import TrainingError
from trainer.recipe.sections import Recipe
from trainer.recipe.targets import Targets
from trainer.sweep import space
from trainer.sweep.outcome import Comparison, Outcome, Status
from trainer.sweep.space import DROPOUT, EPOCHS, EPOCHS_TRIED, RANK, RATE, STEPS, TARGETS, Phase
from trainer.sweep.values import Values, with_values

_BEYOND, _TIMES = 2, 2.0
"""How often a learning rate above the highest is tried where the highest is taken, and how much higher."""
_DROPOUTS = (0.05, 0.1)


class Study(Protocol):
    """The trials of one phase."""

    def attempt(self, chosen: Values, values: Values) -> Outcome:
        """Makes a trial, unless it was made before."""

    def search(self) -> Outcome:
        """Makes the next trial of a space."""

    def found(self) -> list[Outcome]:
        """The trials of a search that were made before."""


OpenStudy = Callable[[Phase, Mapping[str, Any]], Study]


@dataclass(frozen=True, slots=True)
class Tried:
    """An outcome, and what it was made for; one training may serve two phases."""

    phase: Phase
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Plan:
    """What is left: epochs of each trial to come, as far as that is known."""

    epochs: tuple[float, ...]


@dataclass
class Search:
    """One sweep's way.

    Args:
        open_study: the study of a phase, with all that may be tried in it.
        on_begin: is told of each trial before it is made, with what is left, itself among it.
        on_end: is told of each trial.

    Attributes:
        tried: so far, in their order.
        notes: why a phase was left out, or gone beyond.
    """

    recipe: Recipe
    comparison: Comparison
    open_study: OpenStudy
    on_begin: Callable[[Phase, Values, Plan], None]
    on_end: Callable[[Tried], None]
    tried: list[Tried] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _later: list[float] = field(default_factory=list)

    def run(self) -> Outcome:
        """Tries what there is to try, and returns the winner. The recipe as it is comes first, and is never given up.

        Raises:
            TrainingError: no trial of a phase was completed.
        """
        own = self.recipe.sweep.space is not None
        self._later = [self.recipe.train.epochs] * (self.recipe.sweep.trials - 1) if own else self._all_phases()
        as_it_is = self._each(Phase.RECIPE, "", [(None, {})])
        self._later = []
        return self._choose([*as_it_is, *(self._own_space() if own else self._phases())])

    def _all_phases(self) -> list[float]:
        """Epochs of their trials. That of the default rate is mostly the recipe's, that of one epoch is known."""
        rates, ranks = space.learning_rates(self.recipe), space.ranks(self.recipe)
        return [1.0] * (len(rates) - 1 + max(0, len(ranks) - 1)) + list(EPOCHS_TRIED[1:])

    def _phases(self) -> list[Outcome]:
        """The outcomes that stand for the last choice, the preferred one first."""
        one = {EPOCHS: 1.0, STEPS: None}
        rates, ranks = space.learning_rates(self.recipe), space.ranks(self.recipe)
        self._later = [1.0] * max(0, len(ranks) - 1) + list(EPOCHS_TRIED[1:])
        best = self._learning_rate(rates, one)
        if ranks:
            self._later = list(EPOCHS_TRIED[1:])
            best = self._rank(ranks, best)
        self._later = []
        best = self._epochs(best)
        best = self._dropout(self._targets(best, ranks))
        return [best]

    def _learning_rate(self, rates: Sequence[float], one: Values) -> Outcome:
        """The default first: it is what others must be told apart from."""
        default, top = self.recipe.learning_rate, rates[-1]
        beyond = [top * _TIMES**time for time in range(1, _BEYOND + 1)]
        study = self.open_study(Phase.LEARNING_RATE, {RATE: (*rates, *beyond)})
        # From the default outwards: the first two are never given up, and the others are measured against them.
        order = sorted(rates, key=lambda rate: abs(rates.index(rate) - rates.index(default)))
        outcomes = self._each(Phase.LEARNING_RATE, RATE, [(rate, {**one, RATE: rate}) for rate in order], study)
        for rate in beyond:
            best = self._choose(_default_or_best(outcomes))
            if best.values[RATE] * _TIMES != rate:
                break
            self.notes.append(f"learning rate {rate:g} was tried since the highest one, {rate / _TIMES:g}, was taken")
            outcomes += self._each(Phase.LEARNING_RATE, RATE, [(rate, {**one, RATE: rate})], study)
        return self._choose(_default_or_best(outcomes))

    def _rank(self, ranks: Sequence[int], best: Outcome) -> Outcome:
        default = self.recipe.rank
        study = self.open_study(Phase.RANK, {RANK: tuple(ranks)})
        order = [default, *(rank for rank in ranks if rank != default)]
        outcomes = self._each(Phase.RANK, RANK, [(rank, best.values | {RANK: rank}) for rank in order], study)
        return self._choose(outcomes or [best])

    def _epochs(self, best: Outcome) -> Outcome:
        """One epoch was tried; each further one while the one before has lowered held-out loss."""
        default = None if self.recipe.train.steps else self.recipe.train.epochs
        lengths = tuple(sorted({*EPOCHS_TRIED, *([default] if default else [])}))
        study = self.open_study(Phase.EPOCHS, {EPOCHS: lengths})
        outcomes: list[Outcome] = []
        for epochs in lengths:
            outcomes += self._each(Phase.EPOCHS, EPOCHS, [(epochs, best.values | {EPOCHS: epochs})], study)
            if len(outcomes) > 1 and outcomes[-1].mean >= outcomes[-2].mean:
                break  # a longer one would be worse still
        outcomes.sort(key=lambda one: one.values[EPOCHS] != default)  # of the others the shortest stays first
        return self._choose(outcomes or [best])

    def _targets(self, best: Outcome, ranks: Sequence[int]) -> Outcome:
        """More layers, where the largest rank was needed and there are more."""
        if not ranks or self.recipe.adapter.targets is Targets.ALL_LINEAR:
            return best
        if best.values[RANK] != ranks[-1]:
            self.notes.append(f"more targets were not tried: rank {ranks[-1]} is no better than {best.values[RANK]}")
            return best
        study = self.open_study(Phase.TARGETS, {TARGETS: (Targets.ALL_LINEAR.value,)})
        targets = Targets.ALL_LINEAR.value
        found = self._each(Phase.TARGETS, TARGETS, [(targets, best.values | {TARGETS: targets})], study)
        return self._choose([best, *found])

    def _dropout(self, best: Outcome) -> Outcome:
        """Where held-out loss rose while training loss fell, in the winner or in the longest training."""
        if self.recipe.adapter_type is None:
            return best
        longest = [best, *self._of(Phase.EPOCHS)][-1]
        if not (best.overfits or longest.overfits):
            self.notes.append("dropout was not tried: held-out loss rose in no training beyond chance")
            return best
        study = self.open_study(Phase.DROPOUT, {DROPOUT: _DROPOUTS})
        values = longest.values | ({TARGETS: best.values[TARGETS]} if TARGETS in best.values else {})
        found = self._each(Phase.DROPOUT, DROPOUT, [(share, values | {DROPOUT: share}) for share in _DROPOUTS], study)
        return self._choose([best, *found])

    def _own_space(self) -> list[Outcome]:
        """All combinations of short lists, else as many trials as the recipe says, or has time for."""
        sweep = self.recipe.sweep
        study = self.open_study(Phase.SPACE, dict(sweep.space or {}))
        if (every := space.combinations(self.recipe)) is not None:
            for number, values in enumerate(every):
                if self._is_late():
                    break
                self._one(Phase.SPACE, values, len(every) - number, self._attempt(study, values, values))
        else:
            for outcome in study.found():
                self._end(Phase.SPACE, outcome)
            while (made := len(self._of(Phase.SPACE))) < sweep.trials and not self._is_late():
                self._one(Phase.SPACE, {}, sweep.trials - made, study.search)
        return sorted(self._of(Phase.SPACE), key=lambda outcome: outcome.mean)[:1]

    def _of(self, phase: Phase) -> list[Outcome]:
        return [one.outcome for one in self.tried if one.phase is phase]

    def _is_late(self) -> bool:
        limit = self.recipe.sweep.seconds
        if limit is None or sum({one.outcome.key: one.outcome.seconds for one in self.tried}.values()) < limit:
            return False
        note = f"trials were left out: sweep.seconds, {limit:g}, were over"
        self.notes += [] if note in self.notes else [note]
        return True

    def _each(
        self, phase: Phase, key: str, candidates: Sequence[tuple[Any, Values]], study: Study | None = None
    ) -> list[Outcome]:
        study = study or self.open_study(phase, {})
        outcomes = []
        for number, (value, values) in enumerate(candidates):
            if phase is not Phase.RECIPE and self._is_late():
                break
            chosen = {key: value} if key else {}
            attempt = self._attempt(study, chosen, values)
            outcomes.append(self._one(phase, values, len(candidates) - number, attempt))
        return outcomes

    def _attempt(self, study: Study, chosen: Values, values: Values) -> Callable[[], Outcome]:
        return lambda: study.attempt(chosen, values)

    def _one(self, phase: Phase, values: Values, left: int, attempt: Callable[[], Outcome]) -> Outcome:
        epochs = with_values(self.recipe, values).train.epochs
        self.on_begin(phase, values, Plan((*[epochs] * left, *self._later)))
        return self._end(phase, attempt())

    def _end(self, phase: Phase, outcome: Outcome) -> Outcome:
        self.tried.append(Tried(phase, outcome))
        self.on_end(self.tried[-1])
        return outcome

    def _choose(self, outcomes: Sequence[Outcome]) -> Outcome:
        if all(one.status is not Status.COMPLETE for one in outcomes):
            whys = "; ".join(one.why or "" for one in outcomes)
            raise TrainingError(f"no trial was completed: {whys}", todo="lower train.learning_rate in the recipe")
        return self.comparison.choose(outcomes)


def _default_or_best(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The first outcome is the default's; of others none is cheaper, so that the best of them comes next."""
    return [outcomes[0], *sorted(outcomes[1:], key=lambda one: one.mean)]


def runner_up(tried: Sequence[Tried], winner: Outcome) -> Outcome | None:
    """The best of the others; None where nothing else was completed."""
    others = [one.outcome for one in tried if one.outcome.key != winner.key]
    complete = [one for one in others if one.status is Status.COMPLETE]
    return min(complete, key=lambda one: one.mean, default=None)
