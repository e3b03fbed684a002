"""The report as one HTML page that needs nothing else: no script, no network, light, dark and on paper.

What models answered is text of strangers. The template escapes all that is put into it, and the page's own policy lets
a browser load and run nothing.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from svc.engine.probes import EngineFacts
from svc.evaluation.comparison import Direction
from svc.evaluation.intervals import Interval
from svc.registry.manifest import Manifest
from svc.report.judged import BASE, SIDE_BY_SIDE, WORST, ModelComparison
from svc.report.plots.curve import plot_learning_rate, plot_loss
from svc.report.plots.data import plot_labels, plot_lengths
from svc.report.plots.metrics import plot_numbers, plot_shares
from svc.report.report import Report
from svc.report.text import cut_text, visible

if TYPE_CHECKING:
    from jinja2 import Environment


def report_page(report: Report) -> str:
    """The page."""
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            report=report,
            judged=report.judged,
            models=list(report.judged.evaluations),
            manifest=report.manifest,
            plots=_plots(report),
            engines=_engines(report.manifest),
            recipe=yaml.safe_dump(report.manifest.recipe, sort_keys=False, allow_unicode=True, width=100),
            worst_count=WORST,
            side_by_side_count=SIDE_BY_SIDE,
        )
    )


def say_verdict(verdict: ModelComparison, metric: str) -> str:
    """A verdict as a sentence.

    Args:
        metric: title of the primary one.
    """
    model = f"the {verdict.model} model"
    other = "its base" if verdict.other == BASE else f"the {verdict.other} model"
    if verdict.outcome is Direction.UNDECIDED:
        said = f"No difference beyond doubt between {model} and {other}"
    else:
        said = f"{model.capitalize()} is {verdict.outcome} than {other}"
    change = f", a change of {signed(verdict.change)}" if verdict.change else ""
    return f"{said}: {metric} {verdict.value} against {verdict.before}{change}."


def signed(change: Interval) -> str:
    """A change with its interval, each with its sign."""
    return minus(f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]")


def minus(text: str) -> str:
    """A number with the sign that is as wide as a plus."""
    return text.replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """As a person says it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _plots(report: Report) -> dict[str, str]:
    found = {
        "shares": plot_shares(report.judged.rows),
        "numbers": plot_numbers(report.judged.rows),
        "loss": plot_loss(report.curve),
        "learning_rate": plot_learning_rate(report.curve),
        "lengths": plot_lengths(report.data),
        "labels": plot_labels(report.data.labels, report.heldout_labels),
    }
    return {name: svg for name, svg in found.items() if svg}


def _engines(manifest: Manifest) -> dict[str, EngineFacts]:
    """The engine that each format was judged on."""
    return {format.value: record.probes[0].engine for format, record in manifest.formats.items() if record.probes}


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (say_verdict, minus, duration, cut_text, visible)
    made.filters |= {one.__name__: one for one in filters}
    return made
