"""Plots of a training curve: one plot of the training and held-out losses, and one of the learning rate."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trainer.report.plots.svg import Color, draw_svg
from trainer.training_curve import TrainingPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_HEIGHT = 250
_FEW_POINTS = 40
_WINDOW = 0.05
_STEEP = 20
"""Ratio of the largest loss to the median loss above which the axis is logarithmic, so that both are readable."""


def plot_loss(curve: Sequence[TrainingPoint]) -> str | None:
    """Return a plot of training loss and held-out loss by step, or None if the curve has neither.

    The training loss is smoothed if there are many steps.
    """
    steps, losses = _series(curve, "loss")
    held_steps, held = _series(curve, "heldout_loss")
    examples = max((len(point.heldout_each) for point in curve), default=0)  # fewer than were evaluated
    everything = np.concatenate([losses, held])
    if not len(everything):
        return None

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        trained = Color.MERGED.value
        if len(steps) <= _FEW_POINTS:
            axes.plot(steps, losses, color=trained, marker="o", markersize=3, label="training")
        else:
            axes.plot(steps, losses, color=trained, alpha=0.35, linewidth=0.8)
            axes.plot(steps, _smoothed(losses), color=trained, linewidth=1.8, label="training, smoothed")
        if len(held):
            mark = "s" if len(held) <= _FEW_POINTS else ""
            label = f"held-out, {examples} examples" if examples else "held-out"
            axes.plot(held_steps, held, color=Color.GPTQ.value, marker=mark, markersize=5, label=label, clip_on=False)
        _finish(axes)
        if everything.max() > _STEEP * np.median(everything) > 0 and everything.min() > 0:
            axes.set_yscale("log")
            axes.autoscale(axis="y")
        axes.legend(loc="upper right")

    parts = []
    if len(losses):
        parts.append(f"training loss from {losses[0]:.3f} to {losses[-1]:.3f} in {int(steps[-1])} steps")
    if len(held):
        parts.append(f"held-out loss from {held[0]:.3f} to {held[-1]:.3f}, lowest {held.min():.3f}")
    return draw_svg("loss", "; ".join(parts), _HEIGHT, draw)


def plot_learning_rate(curve: Sequence[TrainingPoint]) -> str | None:
    """Return a plot of the learning rate at each step, or None if the curve has no learning rates."""
    steps, rates = _series(curve, "learning_rate")
    if not len(steps):
        return None

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.plot(steps, rates, color=Color.MERGED.value)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axes.yaxis.get_offset_text().set_color(Color.MUTED.value)
        _finish(axes)

    return draw_svg("learning-rate", f"learning rate, maximum {rates.max():.2g}", _HEIGHT, draw)


def _finish(axes: "Axes") -> None:
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", nbins=6, integer=True)


def _series(curve: Sequence[TrainingPoint], name: str) -> tuple["Floats", "Floats"]:
    """Return the steps at which the quantity `name` was recorded, and its values."""
    points = [(point.step, value) for point in curve if (value := getattr(point, name)) is not None]
    return np.array([step for step, _ in points], dtype=float), np.array([value for _, value in points], dtype=float)


def _smoothed(values: "Floats") -> "Floats":
    """Return centered moving averages over a twentieth of all steps, with shorter windows at both ends."""
    window = np.ones(2 * max(1, round(len(values) * _WINDOW / 2)) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
