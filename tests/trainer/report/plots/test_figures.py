"""Tests the content of each figure."""

import math
import re

import pytest

from svc.evaluation.intervals import Interval
from svc.evaluation.metrics.metric import Better, Unit
from tests.builders.judged_versions import curve
from tests.svc.chats import chat
from trainer.data.summary import summarize_data
from trainer.report.judged import BASE, MetricRow
from trainer.report.plots.curve import plot_learning_rate, plot_loss
from trainer.report.plots.data import plot_labels, plot_lengths
from trainer.report.plots.metrics import plot_numbers, plot_shares
from trainer.training_curve import TrainingPoint


def label_of(svg: str | None) -> str:
    """Return the text alternative of an SVG figure."""
    assert svg is not None
    [found] = re.findall('aria-label="([^"]*)"', svg)
    return str(found)


def row(name: str, value: float, unit: Unit = Unit.SHARE, better: Better = Better.HIGHER) -> MetricRow:
    """Return a metric row comparing two models."""
    estimate = Interval(value=value, low=value * 0.9, high=value * 1.1)
    return MetricRow(name, name, unit, better, {BASE: estimate, "gptq": estimate}, {})


ROWS = [
    row("accuracy", 0.5),
    row("nll", 2.0, Unit.NUMBER, Better.LOWER),
    row("cut off", 0.1, Unit.SHARE, Better.LOWER),
    row("perplexity", 7.4, Unit.NUMBER, Better.LOWER),
    row("length", 12.0, Unit.TOKENS, Better.NEITHER),
]


@pytest.mark.slow
def test_proportions_are_plotted_separately_from_other_metrics() -> None:
    shares, numbers = plot_shares(ROWS), plot_numbers(ROWS)
    assert label_of(shares) == "accuracy: base 0.500 [0.450, 0.550], gptq 0.500 [0.450, 0.550]"
    assert label_of(numbers).startswith("nll: base 2.000")
    assert "perplexity" not in (numbers or "")
    assert "length" not in (numbers or "")


def test_no_plot_is_created_without_data() -> None:
    assert plot_shares(ROWS[1:]) is None
    assert plot_numbers([ROWS[0], ROWS[4]]) is None
    assert plot_loss([]) is None
    assert plot_learning_rate([TrainingPoint(step=0, epoch=0, heldout_loss=1.0)]) is None
    assert plot_labels({}, {}) is None


@pytest.mark.slow
def test_description_of_a_training_curve_states_the_first_and_last_losses() -> None:
    description = label_of(plot_loss(curve()))
    assert re.fullmatch(
        r"training loss from 2\.\d+ to 0\.\d+ in 80 steps; held-out loss from 2\.900 to 0\.503, lowest 0\.503",
        description,
    )
    assert label_of(plot_learning_rate(curve())) == "learning rate, maximum 0.00049"


@pytest.mark.slow
def test_training_curve_is_plotted_even_if_no_held_out_loss_was_measured() -> None:
    points = [TrainingPoint(step=step, epoch=1, loss=1 / step) for step in (1, 2)]
    assert label_of(plot_loss(points)) == "training loss from 1.000 to 0.500 in 2 steps"


@pytest.mark.slow
def test_plot_of_50000_steps_is_less_than_three_times_as_large_as_a_plot_of_300_steps() -> None:
    many = plot_loss(curve(50_000))
    assert many is not None
    assert len(many) < 3 * len(plot_loss(curve(300)) or "")


@pytest.mark.slow
@pytest.mark.parametrize("exploded", [False, True])
def test_exploding_loss_is_plotted_on_a_logarithmic_axis(exploded: bool) -> None:
    points = [TrainingPoint(step=step, epoch=1, loss=2 + math.sin(step)) for step in range(1, 60)]
    points += [TrainingPoint(step=60, epoch=1, loss=5000.0)] * exploded
    assert ("10^" in (plot_loss(points) or "") or "mathdefault" in (plot_loss(points) or "")) == exploded


@pytest.mark.slow
def test_length_plot_description_covers_prompts_and_answers() -> None:
    description = label_of(plot_lengths(summarize_data([chat("x" * 100, "y" * 7)] * 3, [])))
    assert description.startswith("prompts: half have at most 100 characters")
    assert "answers: half have at most 7 characters" in description


@pytest.mark.slow
def test_label_plot_description_covers_training_and_held_out_counts() -> None:
    assert label_of(plot_labels({"net": 5, "games": 2}, {"net": 1})).endswith("by label: net 5 and 1, games 2 and 0")
