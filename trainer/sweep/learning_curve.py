"""Implements `svc train --curve`, which trains on subsets of the data and uses a power law to estimate the
gain from twice as much data.

The power law is loss(n) = floor + scale * n^-exponent, the form of most learning curves of neural
networks (Hestness et al. 2017).
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.table import Table

from svc.errors import DataError, TrainingError
from svc.evaluation.intervals import Interval, bootstrap
from svc.files.disk import write_whole
from svc.terminal import console, output

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trainer.sweep.trial_runner import TrialRunner

    Floats = NDArray[np.float64]

CURVE_FILE = "curve.json"
_MIN_EXAMPLES = 20
"""Minimum number of examples for a learning curve. With fewer, the smallest subset (one tenth) is too small to train
on."""
_SHARES = (0.1, 0.25, 0.5, 1.0)
_MIN_POINTS = 4
_EXPONENTS = np.linspace(0.05, 2.0, 79)
_MAX_MISFIT = 0.15
"""Maximum error of the power-law fit at any point, as a share of the total drop in the measured losses."""
_MIN_GAIN = 0.02
"""Gain below which doubling the data counts as having little benefit, as a share of the loss with all examples."""


class Benefit(StrEnum):
    """Verdict on the benefit of doubling the data."""

    WORTH = "worth it"
    LITTLE = "little"
    UNKNOWN = "cannot be told"


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Point(_Result):
    """A training run on a subset of the data, and its held-out loss in nats per answer token."""

    examples: int
    loss: Interval
    steps: int
    seconds: float


class PowerLaw(_Result):
    """A power law that describes how the loss depends on the number of examples: loss(n) = floor + scale *
    n^-exponent.
    """

    floor: float
    scale: float
    exponent: float

    def at(self, examples: "Floats") -> "Floats":
        """Return the predicted losses for the given numbers of examples."""
        return np.asarray(self.floor + self.scale * examples**-self.exponent)


class LearningCurve(_Result):
    """A learning curve's measured points and the conclusion drawn from them.

    Attributes:
        base: held-out loss before any training.
        law: the fitted power law, or None if no power law fits the points. In that case, `doubled` and
            `gain` are None too.
        doubled: predicted loss with twice the examples.
        gain: predicted loss with all examples minus the predicted loss with twice as many.
        sentence: the conclusion as a human-readable sentence.
    """

    points: tuple[Point, ...]
    base: Interval
    law: PowerLaw | None = None
    doubled: Interval | None = None
    gain: Interval | None = None
    verdict: Benefit = Benefit.UNKNOWN
    sentence: str


def run_curve(runner: "TrialRunner") -> LearningCurve:
    """Complete the remaining training runs, then write and return the learning curve. The caller must
    hold the runner's lock.

    Raises:
        DataError: there are too few examples.
        InterruptedRunError: the command was interrupted; running the same command again resumes it.
        TrainingError: the loss of a training run exploded, or memory ran out.
    """
    examples, rows = runner.examples.train, runner.data.train
    if len(examples) < _MIN_EXAMPLES:
        raise DataError(
            f"found only {len(examples)} examples", expected=f"at least {_MIN_EXAMPLES} for a learning curve"
        )
    base = runner.base_loss()
    points, each = [], []
    for part in nested_subsets([example.answer for example in examples], runner.recipe.data.seed):
        console.print(f"[bold]{len(part)} of {len(examples)} examples[/bold]")
        outcome = runner.run_trial({}, lambda step, loss: None, [rows[number] for number in part])
        if outcome.loss is None:
            wrong = f"training on {len(part)} examples failed: {outcome.why}"
            raise TrainingError(wrong, todo="see docs/training.md")
        console.print(f"  held-out loss {outcome.loss}")
        points.append(Point(examples=len(part), loss=outcome.loss, steps=outcome.steps, seconds=outcome.seconds))
        each.append(outcome.heldout_each)
    curve = extrapolate(points, each, runner.answer_lengths, base)
    write_whole(runner.folder / CURVE_FILE, curve.model_dump_json(indent=1).encode("utf-8"))
    return curve


def nested_subsets(labels: Sequence[Hashable], seed: int) -> list[tuple[int, ...]]:
    """Return nested subsets of example indices, one for each share of the data. Each subset contains the
    previous one and the same share of every label.

    Args:
        labels: labels of all examples. If every label is unique, the subsets are random.
    """
    generator = np.random.default_rng(seed)
    groups = defaultdict(list)
    for place in generator.permutation(len(labels)).tolist():
        groups[labels[place]].append(place)
    # A label's examples are spaced evenly between 0 and 1, from a random start: any prefix has its share.
    order = np.empty(len(labels))
    for places in groups.values():
        order[places] = (np.arange(len(places)) + generator.random()) / len(places)
    placed = np.argsort(order, kind="stable").tolist()
    return [tuple(sorted(placed[: max(1, round(share * len(labels)))])) for share in _SHARES]


def fit(examples: "Floats", losses: "Floats") -> "Floats":
    """Fit a power law to each row of losses by least squares, with a non-negative floor and scale.

    For each exponent in a grid, floor and scale follow from a linear regression, which is solved for all
    rows together.

    Args:
        examples: numbers of examples, of shape [points].
        losses: losses to fit, of shape [rows, points].

    Returns:
        Floor, scale and exponent of each row, of shape [rows, 3].
    """
    x = examples ** -_EXPONENTS[:, None]
    centred = x - x.mean(axis=1, keepdims=True)
    scale = np.maximum(losses @ (centred / (centred**2).sum(axis=1, keepdims=True)).T, 0.0)
    floor = losses.mean(axis=1, keepdims=True) - scale * x.mean(axis=1)
    through_zero = losses @ (x / (x**2).sum(axis=1, keepdims=True)).T
    scale, floor = np.where(floor < 0, through_zero, scale), np.maximum(floor, 0.0)
    errors = ((losses[:, None] - floor[..., None] - scale[..., None] * x) ** 2).sum(axis=2)
    best = errors.argmin(axis=1)
    rows = np.arange(len(losses))
    return np.stack([floor[rows, best], scale[rows, best], _EXPONENTS[best]], axis=1)


def extrapolate(
    points: Sequence[Point], each: Sequence[Sequence[float]], tokens: Sequence[int], base: Interval
) -> LearningCurve:
    """Fit a learning curve to training runs on subsets of the data and report what it predicts.

    Intervals are bootstrapped over the held-out examples, with the same draws for all points.

    Args:
        points: the training runs, in ascending order of their number of examples.
        each: held-out loss of each example, for each point.
        tokens: number of answer tokens of each held-out example.
    """
    sizes = np.array([point.examples for point in points], dtype=float)
    weights = np.array(tokens, dtype=float)
    weighted = np.array(each, dtype=float) * weights

    def fitted(drawn: "Floats", examples: float) -> "Floats":
        laws = fit(sizes, drawn @ weighted.T / (drawn @ weights)[:, None])
        return np.asarray(laws[:, 0] + laws[:, 1] * examples ** -laws[:, 2])

    losses = weighted.sum(axis=1) / weights.sum()
    floor, scale, exponent = fit(sizes, losses[None])[0]
    law = PowerLaw(floor=floor, scale=scale, exponent=exponent)
    if why := _misfit(law, sizes, losses):
        sentence = f"The benefit of more data cannot be estimated: {why}."
        return LearningCurve(points=tuple(points), base=base, sentence=sentence)
    now, doubled_size = sizes[-1], 2 * sizes[-1]
    doubled = bootstrap(len(weights), lambda drawn: fitted(drawn, doubled_size))
    gain = bootstrap(len(weights), lambda drawn: fitted(drawn, now) - fitted(drawn, doubled_size))
    verdict, threshold = Benefit.UNKNOWN, _MIN_GAIN * losses[-1]
    if gain.low >= threshold:
        verdict = Benefit.WORTH
    elif gain.high < threshold:
        verdict = Benefit.LITTLE
    sentence = (
        f"Twice the data would lower held-out loss by about {gain.value:.3f} (95% {gain.low:.3f} to {gain.high:.3f}), "
        f"from {losses[-1]:.3f} to {doubled.value:.3f}: {verdict}."
    )
    return LearningCurve(
        points=tuple(points), base=base, law=law, doubled=doubled, gain=gain, verdict=verdict, sentence=sentence
    )


def _misfit(law: PowerLaw, sizes: "Floats", losses: "Floats") -> str | None:
    """Return the reason why the points do not allow extrapolation, or None if they do."""
    if len(sizes) < _MIN_POINTS:
        return f"there are {len(sizes)} points, but a fit needs {_MIN_POINTS}"
    fall = losses[0] - losses[-1]
    if fall <= 0 or law.scale == 0:
        return "held-out loss did not fall with more data"
    errors = losses - law.at(sizes)
    worst = np.abs(errors).argmax()
    if abs(errors[worst]) > _MAX_MISFIT * fall:
        at = f"at {sizes[worst]:.0f} examples the best fit is off by {errors[worst]:+.3f}"
        return f"no power law fits the points; {at}"
    return None


def print_curve(curve: LearningCurve, heldout: int) -> None:
    """Print the learning curve to stdout."""
    table = Table("examples", "held-out loss", "steps", "time", box=None)
    table.add_row("0 (base)", str(curve.base))
    for point in curve.points:
        table.add_row(f"{point.examples}", str(point.loss), f"{point.steps}", f"{point.seconds:.0f} s")
    if curve.doubled:
        table.add_row(f"{2 * curve.points[-1].examples} (predicted)", str(curve.doubled))
    output.print(table)
    output.print(f"\nnats per answer token on {heldout} held-out examples, with 95% intervals")
    output.print(f"[bold]{curve.sentence}[/bold]")
