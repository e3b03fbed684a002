"""Plots of training data: text lengths and label frequencies."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trainer.data.summary import DataSummary
from trainer.report.plots.svg import Color, draw_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEIGHT = 250
_ROW = 21
_MANY_DECADES = 10**3.5
_MAX_LABELS = 25


def plot_lengths(data: DataSummary) -> str | None:
    """Return a plot of prompt and answer lengths, as two histograms over one logarithmic axis, or None if there are no
    training examples.
    """
    if data.prompts is None or data.answers is None:
        return None
    parts = {"prompts": (data.prompts, Color.MERGED), "answers": (data.answers, Color.GPTQ)}

    def draw(figure: "Figure") -> None:
        from matplotlib.ticker import LogLocator, NullLocator

        axes = figure.subplots()
        for at, (name, (lengths, color)) in enumerate(parts.items()):
            axes.stairs(lengths.counts, lengths.edges, fill=True, color=color.value, alpha=0.35)
            style = ("-", "--")[at]
            axes.stairs(lengths.counts, lengths.edges, color=color.value, linewidth=1.6, linestyle=style, label=name)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high / low < _MANY_DECADES else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
        axes.set_xlabel("characters")
        axes.set_ylabel("training examples")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=2)

    text = "; ".join(
        f"{name}: half have at most {lengths.median} characters, 95% at most {lengths.p95}, the longest has "
        f"{lengths.longest}"
        for name, (lengths, _) in parts.items()
    )
    return draw_svg("lengths", text, _HEIGHT, draw)


def plot_labels(trained: Mapping[str, int], heldout: Mapping[str, int]) -> str | None:
    """Return a plot of each label's share of training and held-out examples, or None if there are no labels.

    Args:
        trained: count of each label, most frequent first; at most 25 are drawn.
    """
    if not trained:
        return None
    labels = list(trained)[:_MAX_LABELS]
    series = (
        ("training", trained, Color.MERGED, "s"),
        ("held-out", heldout, Color.GPTQ, "D"),
    )

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for name, counts, color, mark in series:
            total = max(1, sum(counts.values()))
            shares = [100 * counts.get(label, 0) / total for label in labels]
            axes.plot(shares, range(len(labels)), mark, color=color.value, markersize=6, label=name, clip_on=False)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(axis="y", length=0, labelcolor=Color.INK.value)
        axes.set_xlim(left=0)
        axes.set_xlabel("% of examples")
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.4)

    counts = ", ".join(f"{label} {trained[label]} and {heldout.get(label, 0)}" for label in labels)
    return draw_svg("labels", f"training and held-out examples by label: {counts}", 90 + _ROW * len(labels), draw)
