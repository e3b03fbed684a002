"""Plots metrics of the base, merged and quantized models as dots with intervals."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from svc.evaluation.metrics.metric import Better, Unit
from svc.evaluation.metrics.tokens import Perplexity
from svc.version import Format
from trainer.report.judged import BASE, MetricRow
from trainer.report.plots.svg import Color, draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOOKS = {
    BASE: (Color.BASE, "o"),
    Format.MERGED.value: (Color.MERGED, "s"),
    Format.GPTQ.value: (Color.GPTQ, "D"),
    Format.AWQ.value: (Color.AWQ, "P"),
    Format.INT8.value: (Color.INT8, "^"),
    Format.FP8.value: (Color.FP8, "v"),
}
"""Color and marker of each model. Either of the two is enough to identify the model."""
_ROW = 46
_MAX_TITLE_CHARS = 24


def plot_shares(rows: Sequence[MetricRow]) -> str | None:
    """Plot all metrics that are shares and for which higher is better, on one common axis.

    The result is None if there are no such metrics.
    """
    shares = [row for row in rows if row.unit is Unit.SHARE and row.better is Better.HIGHER]
    if not shares:
        return None

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        _dots(axes, shares)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        _legend(figure, axes)

    return draw_svg("shares", _describe(shares), 60 + _ROW * len(shares), draw)


def plot_numbers(rows: Sequence[MetricRow]) -> str | None:
    """Plot all metrics that rank models and are not shares, each on its own axis.

    The result is None if there are no such metrics. Perplexity is left out because it is a function of the
    log-likelihood.
    """
    directed = [row for row in rows if row.better is not Better.NEITHER]
    numbers = [row for row in directed if row.unit is not Unit.SHARE and row.name != Perplexity.name]
    if not numbers:
        return None

    def draw(figure: "Figure") -> None:
        all_axes = figure.subplots(len(numbers), 1, squeeze=False).ravel()
        for axes, row in zip(all_axes, numbers, strict=True):
            _dots(axes, [row])
            axes.set_xlim(left=min(0, axes.get_xlim()[0]))
            axes.locator_params(axis="x", nbins=5)
        _legend(figure, all_axes[0])

    return draw_svg("numbers", _describe(numbers), 40 + 2 * _ROW * len(numbers), draw)


def _describe(rows: Sequence[MetricRow]) -> str:
    """Return a text description of a plot, listing each metric's value for each model."""
    return "; ".join(
        f"{row.title}: {', '.join(f'{model} {estimate}' for model, estimate in row.estimates.items())}" for row in rows
    )


def _dots(axes: "Axes", rows: Sequence[MetricRow]) -> None:
    """Draw one row per metric, from top to bottom, and one dot with its interval per model within each row."""
    models = [model for model in _LOOKS if any(model in row.estimates for row in rows)]
    for at, model in enumerate(models):
        color, mark = _LOOKS[model]
        offset = (at - (len(models) - 1) / 2) * 0.24
        dots = {place + offset: row.estimates[model] for place, row in enumerate(rows) if model in row.estimates}
        spans = np.array([(dot.value - dot.low, dot.high - dot.value) for dot in dots.values()])
        axes.errorbar(
            [dot.value for dot in dots.values()],
            list(dots),
            xerr=spans.clip(0).T,
            fmt=mark,
            markersize=6,
            color=color.value,
            elinewidth=2,
            label=model,
            clip_on=False,
        )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [_title(row) for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=Color.INK.value)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _legend(figure: "Figure", axes: "Axes") -> None:
    marks, labels = axes.get_legend_handles_labels()
    figure.legend(marks, labels, loc="outside upper left", ncols=len(labels), handletextpad=0.4, columnspacing=1.4)


def _title(row: MetricRow) -> str:
    return row.title if len(row.title) <= _MAX_TITLE_CHARS else f"{row.title[: _MAX_TITLE_CHARS - 1]}…"
