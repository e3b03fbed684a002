"""A sweep on one screen: every trial, what was taken, and how sure that is."""

import shlex
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from svc.terminal import output
from trainer.sweep.outcome import Status
from trainer.sweep.sweep import WINNER_FILE, Line, SweepResult, settings_of_winner
from trainer.sweep.values import describe


def print_sweep(result: SweepResult, folder: Path, picture: Path) -> None:
    """Prints it to stdout."""
    output.print(trial_table(result))
    output.print(f"\nheld-out loss, nats an answer token, on {result.heldout} examples, with 95 % intervals")
    output.print(f"base {result.base}, the recipe as it is {result.recipe or '-'}, the winner {result.loss}")
    output.print(f"[bold]winner: {escape(describe(result.winner))}[/bold]")
    if result.warning:
        output.print(f"[yellow]{escape(result.warning)}[/yellow]")
    for note in result.notes:
        output.print(f"[dim]{escape(note)}[/dim]")
    flags = "".join(f" --set {shlex.quote(one)}" for one in settings_of_winner(result))
    if flags:
        output.print(f"as flags of svc train:{flags}", markup=False, soft_wrap=True)
    output.print(f"as a recipe: {folder / WINNER_FILE}\npicture: {picture}", markup=False, soft_wrap=True)


def trial_table(result: SweepResult) -> Table:
    """One row for each trial, in their order."""
    table = Table("phase", "trial", "held-out loss", "minus the winner's", "steps", "time", box=None)
    for line in result.trials:
        won = line.values == result.winner
        name = escape(describe(line.values))
        table.add_row(
            line.phase, f"[bold]{name}[/bold]" if won else name, *_found(line), f"{line.steps or ''}", _time(line)
        )
    return table


def _found(line: Line) -> tuple[str, str]:
    if line.status is not Status.COMPLETE:
        return f"[dim]{line.status} {escape(line.why or '')}[/dim]", ""
    return str(line.loss), str(line.difference or "")


def _time(line: Line) -> str:
    return f"{line.seconds:.0f} s"
