"""Pictures of a sweep and of a learning curve, as SVG. Imports matplotlib when it draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.sweep.learning_curve import LearningCurve
from trainer.sweep.space import EPOCHS, RANK, RATE, Phase
from trainer.sweep.sweep import Line, SweepResult
from trainer.sweep.values import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KEYS = {Phase.LEARNING_RATE: RATE, Phase.RANK: RANK, Phase.EPOCHS: EPOCHS}


def draw_sweep(result: SweepResult, path: Path) -> Path:
    """Held-out loss with its interval: one panel for each phase, or for each key of an own space."""
    from matplotlib.figure import Figure

    panels = _panels(result)
    figure = Figure(figsize=(3.6 * max(1, len(panels)), 3.4), layout="constrained")
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for axis, (key, lines) in zip(axes, panels.items(), strict=False):
        _draw_panel(axis, key, lines, result)
    axes[0].set_ylabel("held-out loss, nats a token")
    return save(figure, path)


def _panels(result: SweepResult) -> dict[str, list[Line]]:
    complete = [line for line in result.trials if line.loss]
    own = [line for line in complete if line.phase is Phase.SPACE]
    if own:
        return {key: [line for line in own if key in line.values] for key in own[0].values}
    found = {key: [line for line in complete if line.phase is phase] for phase, key in _KEYS.items()}
    return {key: lines for key, lines in found.items() if len(lines) > 1}


def _draw_panel(axis: "Axes", key: str, lines: Sequence[Line], result: SweepResult) -> None:
    """Values at even distances, in their order: rates are a factor apart, and targets have no size."""
    values = sorted({line.values[key] for line in lines}, key=lambda value: (isinstance(value, str), value))
    for line in lines:
        if line.loss is None:
            continue
        won = line.values == result.winner
        low, high = line.loss.value - line.loss.low, line.loss.high - line.loss.value
        colour = "tab:orange" if won else "tab:blue"
        place = values.index(line.values[key])
        axis.errorbar(place, line.loss.value, [[low], [high]], fmt="o", color=colour, capsize=3)
    if result.recipe:
        axis.axhline(result.recipe.value, color="grey", linestyle="--", linewidth=1)
    axis.set_xticks(range(len(values)), [show(value) for value in values])
    axis.set_xlabel(key)


def draw_curve(curve: LearningCurve, path: Path) -> Path:
    """Held-out loss by examples, and the fit up to twice as many."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    sizes = [point.examples for point in curve.points]
    losses = [point.loss for point in curve.points]
    spans = [[loss.value - loss.low for loss in losses], [loss.high - loss.value for loss in losses]]
    axis.errorbar(sizes, [loss.value for loss in losses], spans, fmt="o", color="tab:blue", capsize=3)
    if curve.law and curve.doubled:
        line = np.geomspace(sizes[0], 2 * sizes[-1])
        axis.plot(line, [curve.law.at(size) for size in line], color="grey", linewidth=1)
        low, high = curve.doubled.value - curve.doubled.low, curve.doubled.high - curve.doubled.value
        place = 2 * sizes[-1]
        axis.errorbar(place, curve.doubled.value, [[low], [high]], fmt="o", color="tab:orange", capsize=3)
    axis.set_xscale("log")
    axis.set_xlabel("training examples")
    axis.set_ylabel("held-out loss, nats a token")
    return save(figure, path)


def save(figure: "Figure", path: Path) -> Path:
    """Writes a figure; the same one is the same file."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "tuneserve"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path
