"""Runs a sweep from its first trial to its winner, writes the result to files, and prints it as a table."""

import shlex
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict
from rich.markup import escape
from rich.table import Table

from svc.evaluation.intervals import Interval
from svc.files.disk import write_whole
from svc.terminal import console, output
from trainer.model.config import read_width
from trainer.recipe.recipe import Recipe
from trainer.recipe.sweep import Between
from trainer.sweep.finals import Finals, FinalsResult
from trainer.sweep.outcome import Summary, TrialComparison, TrialOutcome
from trainer.sweep.search import Phase, Search, samples_values
from trainer.sweep.trial_runner import TrialRunner
from trainer.sweep.values import Values, describe, with_values

RESULT_FILE, WINNER_FILE = "result.json", "winner.yaml"


class Line(Summary):
    """One row in the table of a sweep. A trial that is part of two phases has two rows.

    Attributes:
        difference: held-out loss minus the winner's, on the same examples.
    """

    phase: Phase
    difference: Interval | None


class SweepResult(BaseModel):
    """Result of a sweep. Losses are in nats per answer token.

    Attributes:
        winner: values that the winner changes in the recipe. Empty if no trial is significantly
            better.
        recipe: loss of the unchanged recipe, or None if that trial did not complete.
        runner_up: values of the best trial apart from the winner, or None if no other trial was completed.
        difference: held-out loss of the runner-up minus the winner's.
        warning: set if winner and runner-up cannot be distinguished.
        seconds: total training time of all trials.
        heldout: number of held-out examples on which trials are evaluated.
        notes: sentences that explain why a phase was skipped or extended.
        finals: results of the best trials on the engine, or None if the winner was chosen by held-out loss
            alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    winner: Values
    loss: Interval
    base: Interval
    recipe: Interval | None
    runner_up: Values | None
    difference: Interval | None
    warning: str | None
    seconds: float
    heldout: int
    notes: tuple[str, ...]
    trials: tuple[Line, ...]
    finals: FinalsResult | None = None


def run_sweep(runner: TrialRunner, finals: Finals | None = None) -> SweepResult:
    """Run the remaining trials, then write and return the sweep's result. The caller must hold the runner's
    lock.

    Args:
        finals: measures the best trials on the engine. If None, the winner is chosen by held-out loss alone.

    Raises:
        InterruptedRunError: the sweep was interrupted; running the same command again resumes it.
        RecipeError: a value in the recipe's search space is not valid for its key.
        TrainingError: no trial completed.
    """
    _check_space(runner.recipe)
    usual_rate = runner.recipe.usual_learning_rate(read_width(runner.base.folder))
    compare = TrialComparison(runner.answer_lengths)
    with runner.training(sampled=samples_values(runner.recipe.sweep)) as parallel:
        base = runner.base_loss()
        console.print(f"  held-out loss of the base: {base} on {len(runner.data.heldout)} examples")
        studies = runner.folder.absolute() / "study.db"
        studies.unlink(missing_ok=True)  # created again from the trials' outcomes, so a kill leaves no partial study
        storage = f"sqlite:///{studies}"
        search = Search(runner.recipe, usual_rate, compare, runner.start_trial, storage, parallel=parallel)
        winner, measured = search.run(), None
    if finals:
        winner, measured = _run_finals(finals, search, winner)
    result = summarize(search, winner, base, measured)
    write_whole(runner.folder / RESULT_FILE, result.model_dump_json(indent=1).encode("utf-8"))
    write_whole(runner.folder / WINNER_FILE, recipe_text(with_values(runner.recipe, result.winner)).encode("utf-8"))
    return result


def _run_finals(finals: Finals, search: Search, preferred: TrialOutcome) -> tuple[TrialOutcome, FinalsResult | None]:
    """Run the finals and return the winner and the table of results. If the preferred trial's adapter is missing, there
    are no finals, and that trial wins.

    Args:
        preferred: the trial that would win by held-out loss.
    """
    unchanged = next((trial for phase, trial in search.tried if phase is Phase.RECIPE), preferred)
    trials = finals.rank([unchanged, preferred, *(trial for _, trial in search.tried)])
    if preferred.key not in {trial.key for trial in trials}:
        search.notes.append("the winner was chosen by held-out loss alone, because the trials' adapters are missing")
        return preferred, None
    console.print("[bold]finals[/bold]")
    finalists = finals.measure(trials)
    winner = finals.choose(finalists, preferred, search.comparison)
    search.notes += finals.reasons(winner, finalists, preferred)
    return winner.trial, finals.result(winner, finalists)


def _check_space(recipe: Recipe) -> None:
    """Check before the first trial that all values in the search space are valid for their keys."""
    for key, values in (recipe.sweep.space or {}).items():
        for value in (values.low, values.high) if isinstance(values, Between) else values:
            with_values(recipe, {key: value})


def summarize(search: Search, winner: TrialOutcome, base: Interval, finals: FinalsResult | None = None) -> SweepResult:
    """Summarize a finished search as a sweep result."""
    compare, trials = search.comparison, [trial for _, trial in search.tried]
    others = [trial for trial in trials if trial.loss and trial.key != winner.key]
    second = min(others, key=lambda trial: trial.mean, default=None)
    difference = compare.difference(winner, second) if second else None
    warning = None
    if second and not compare.distinct(winner, second):
        warning = (
            f"the winner cannot be distinguished from {describe(second.values)}: held-out loss differs by "
            f"{difference}, an interval that contains 0; more held-out examples would be needed to decide"
        )
    lines = [
        Line(
            phase=phase,
            difference=compare.difference(winner, trial) if trial.loss else None,
            **trial.model_dump(include=set(Summary.model_fields)),
        )
        for phase, trial in search.tried
    ]
    assert winner.loss is not None  # noqa: S101 - only completed trials are chosen
    return SweepResult(
        winner=winner.values,
        loss=winner.loss,
        base=base,
        recipe=next((line.loss for line in lines if line.phase is Phase.RECIPE), None),
        runner_up=second.values if second else None,
        difference=difference,
        warning=warning,
        seconds=round(search.seconds, 1),
        heldout=len(winner.heldout_each),
        notes=tuple(search.notes),
        trials=tuple(lines),
        finals=finals,
    )


def recipe_text(recipe: Recipe) -> str:
    """Return a complete recipe as YAML, with absolute paths."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)


def settings_of_winner(result: SweepResult) -> list[str]:
    """Format the winner's values for `--set`. They are written as YAML, because YAML reads 5.0e-05 as a number
    but Python's 5e-05 as a string.
    """
    return [f"{key}={yaml.safe_dump(value).splitlines()[0]}" for key, value in result.winner.items()]


def print_sweep(result: SweepResult, folder: Path, picture: Path) -> None:
    """Print the result of a sweep to stdout."""
    table = Table("phase", "trial", "held-out loss", "minus the winner's", "steps", "time", box=None)
    for line in result.trials:
        name = escape(describe(line.values))
        loss = str(line.loss) if line.loss else f"[dim]{line.status} {escape(line.why or '')}[/dim]"
        table.add_row(
            line.phase,
            f"[bold]{name}[/bold]" if line.values == result.winner else name,
            loss,
            str(line.difference or ""),
            str(line.steps or ""),
            f"{line.seconds:.0f} s",
        )
    output.print(table)
    output.print(f"\nheld-out loss in nats per answer token on {result.heldout} examples, with 95% intervals")
    if result.finals:
        _print_finals(result.finals, result.winner)
    output.print(f"held-out loss: base {result.base}, unchanged recipe {result.recipe or '-'}, winner {result.loss}")
    output.print(f"[bold]winner: {escape(describe(result.winner))}[/bold]")
    if result.warning:
        output.print(f"[yellow]{escape(result.warning)}[/yellow]")
    for note in result.notes:
        output.print(f"[dim]{escape(note)}[/dim]")
    if flags := "".join(f" --set {shlex.quote(flag)}" for flag in settings_of_winner(result)):
        output.print(f"the same settings as options of `svc train`:{flags}", markup=False, soft_wrap=True)
    output.print(
        f"the recipe with these settings: {folder / WINNER_FILE}\nplot: {picture}", markup=False, soft_wrap=True
    )


def _print_finals(finals: FinalsResult, winner: Values) -> None:
    table = Table("finals", finals.metric, "minus the winner's", "general questions", "minus the base's", box=None)
    for line in finals.lines:
        name = escape(describe(line.values))
        forgetting = f"{line.forgetting or ''}{'' if line.allowed else ': too much'}"
        table.add_row(
            f"[bold]{name}[/bold]" if line.values == winner else name,
            str(line.primary),
            str(line.difference),
            str(line.general or ""),
            forgetting,
        )
    output.print(table)
    general = f" and {finals.questions} general questions (base: {finals.general})" if finals.general else ""
    output.print(f"the finalists were evaluated in vLLM on {finals.examples} held-out examples{general}")
