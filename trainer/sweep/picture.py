"""Draws sweeps and learning curves as SVG. matplotlib is imported only when something is drawn."""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from svc.evaluation.intervals import Interval
from trainer.sweep.learning_curve import LearningCurve
from trainer.sweep.search import EPOCHS, RANK, RATE, Phase
from trainer.sweep.sweep import Line, SweepResult
from trainer.sweep.values import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KEYS = {Phase.LEARNING_RATE: [RATE], Phase.RANK: [RANK], Phase.EPOCHS: [EPOCHS]}
_LABEL = "held-out loss, nats per token"


def draw_sweep(result: SweepResult, path: Path) -> Path:
    """Plot held-out loss against the values tried. There is one panel per phase, or per key of the recipe's
    search space.
    """
    from matplotlib.figure import Figure

    panels: dict[str, list[Line]] = defaultdict(list)
    for line in result.trials:
        for key in line.values if line.phase is Phase.SPACE else _KEYS.get(line.phase, []):
            panels[key] += [line] if line.loss else []
    panels = {key: lines for key, lines in panels.items() if len(lines) > 1}
    figure = Figure(figsize=(3.6 * max(1, len(panels)), 3.4), layout="constrained")
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    axes[0].set_ylabel(_LABEL)
    for axis, (key, lines) in zip(axes, panels.items(), strict=False):
        axis.set_xlabel(key)
        # Values are drawn as texts at equal distances: rates differ by factors, and targets have no size.
        for line in sorted(lines, key=lambda line: _order(line.values[key])):
            color = "tab:orange" if line.values == result.winner else "tab:blue"
            _mark(axis, show(line.values[key]), line.loss, color)
        if result.recipe:
            axis.axhline(result.recipe.value, color="grey", linestyle="--", linewidth=1)
    return _save(figure, path)


def draw_curve(curve: LearningCurve, path: Path) -> Path:
    """Plot held-out loss against the number of examples. The fitted curve extends to twice that number."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.set(xscale="log", xlabel="training examples", ylabel=_LABEL)
    for point in curve.points:
        _mark(axis, point.examples, point.loss, "tab:blue")
    if curve.law:
        sizes = np.geomspace(curve.points[0].examples, 2 * curve.points[-1].examples, dtype=np.float64)
        axis.plot(sizes, curve.law.at(sizes), color="grey", linewidth=1)
        _mark(axis, sizes[-1], curve.doubled, "tab:orange")
    return _save(figure, path)


def _order(value: object) -> tuple[float, str]:
    return (value, "") if isinstance(value, int | float) else (float("inf"), str(value))


def _mark(axis: "Axes", place: float | str, loss: Interval | None, color: str) -> None:
    if loss:
        interval = [[max(0.0, loss.value - loss.low)], [max(0.0, loss.high - loss.value)]]
        axis.errorbar([place], [loss.value], interval, fmt="o", color=color, capsize=3)


def _save(figure: "Figure", path: Path) -> Path:
    """Save a figure as SVG. The same figure always gives an identical file."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "tuneserve"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path
