"""`svc train --curve`: trains on parts of the data, and says what more of it would bring."""

from svc.disk import write_whole
from svc.errors import DataError, TrainingError
from svc.terminal import console, output
from trainer.sweep.learning_curve import LearningCurve, Point, foretell, nested_subsets
from trainer.sweep.outcome import Status
from trainer.sweep.trial import answer_lengths
from trainer.sweep.workplace import Workplace

CURVE_FILE = "curve.json"
_FEWEST = 20
"""Examples: a tenth of fewer is none to train on."""


def run_curve(place: Workplace) -> LearningCurve:
    """Trains on what is left to train on; the caller holds the place.

    Raises:
        DataError: there are too few examples.
        InterruptedRunError: a signal came; the same command goes on.
        TrainingError: a training's loss exploded, or memory was short.
    """
    train = place.examples.train
    if len(train) < _FEWEST:
        raise DataError(f"{len(train)} examples", expected=f"at least {_FEWEST} for a learning curve")
    rows, base = place.data.train, place.base_loss()
    points, each = [], []
    labels = [example.answer for example in train]
    for places in nested_subsets(labels, place.recipe.data.seed):
        console.print(f"[bold]{len(places)} of {len(train)} examples[/bold]")
        outcome = place.trials.run({}, lambda step, loss: None, [rows[number] for number in places])
        if outcome.status is not Status.COMPLETE or outcome.loss is None:
            raise TrainingError(f"the training on {len(places)} examples: {outcome.why}", todo="see docs/training.md")
        console.print(f"  held-out loss {outcome.loss}")
        points.append(
            Point(examples=len(places), loss=outcome.loss, steps=outcome.steps, seconds=round(outcome.seconds, 1))
        )
        each.append(outcome.heldout_each)
    curve = foretell(points, each, answer_lengths(place.data), base)
    write_whole(place.folder / CURVE_FILE, curve.model_dump_json(indent=1).encode("utf-8"))
    return curve


def print_curve(curve: LearningCurve, heldout: int) -> None:
    """Prints it to stdout."""
    from rich.table import Table

    table = Table("examples", "held-out loss", "steps", "time", box=None)
    table.add_row("0 (base)", str(curve.base), "", "")
    for point in curve.points:
        table.add_row(f"{point.examples}", str(point.loss), f"{point.steps}", f"{point.seconds:.0f} s")
    if curve.doubled:
        table.add_row(f"{2 * curve.points[-1].examples} (foretold)", str(curve.doubled), "", "")
    output.print(table)
    output.print(f"\nnats an answer token on {heldout} held-out examples, with 95 % intervals")
    output.print(f"[bold]{curve.sentence}[/bold]")
