"""Renders the report as one self-contained HTML page, with light, dark and print styles. It has no scripts
and loads nothing over the network.

The models' answers are untrusted text. The template escapes every inserted value, and the page's content
security policy keeps a browser from loading or running anything.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from svc.engine.probes import EngineFacts
from svc.evaluation.comparison import Direction
from svc.evaluation.intervals import Interval
from svc.evaluation.preference import PREFERENCE_TITLES
from svc.registry.manifest import Manifest
from svc.store.rollout_text import SIGNAL_COLUMNS, place_of, signal_cells
from trainer.report.judged import BASE, SIDE_BY_SIDE, WORST, ModelComparison
from trainer.report.plots.curve import plot_learning_rate, plot_loss
from trainer.report.plots.data import plot_labels, plot_lengths
from trainer.report.plots.metrics import plot_numbers, plot_shares
from trainer.report.report import Report

if TYPE_CHECKING:
    from jinja2 import Environment


LONGEST = 4_000
_PREVIEW = 280
_PREVIEW_LINES = 6


class CutText(NamedTuple):
    """A text, split for display.

    Attributes:
        start: the part that is always visible: the beginning of a long text, otherwise the whole text.
        rest: the part that is initially collapsed; empty if `start` is the whole text.
        left_out: number of characters that are not on the page.
    """

    start: str
    rest: str
    left_out: int


def cut_text(text: str) -> CutText:
    """Split the text into the part that is always visible and the part that is initially collapsed.

    Everything after the 4,000th character is left out.
    """
    shown = visible(text[:LONGEST])
    start = "".join(shown.splitlines(keepends=True)[:_PREVIEW_LINES])[:_PREVIEW]
    left_out = max(0, len(text) - LONGEST)
    if len(shown) <= len(start) + _PREVIEW // 4 and "\n" not in shown[len(start) :].strip() and not left_out:
        return CutText(shown, "", 0)
    return CutText(start, shown[len(start) :], left_out)


def visible(text: str) -> str:
    """Return the text with visible symbols in place of control characters, some of which HTML must not contain."""
    return text.translate(_PICTURES)


_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD) | dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


def report_page(report: Report) -> str:
    return (
        template_environment(Path(__file__).parent / "templates", autoescape=True)
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
            signal_columns=SIGNAL_COLUMNS,
            preference_titles=PREFERENCE_TITLES,
        )
    )


def say_verdict(verdict: ModelComparison, metric: str) -> str:
    """Return a verdict as a sentence.

    Args:
        metric: display title of the primary metric.
    """
    model = f"the {verdict.model} model"
    other = "its base" if verdict.other == BASE else f"the {verdict.other} model"
    if verdict.outcome is Direction.UNDECIDED:
        outcome = f"No significant difference between {model} and {other}"
    else:
        outcome = f"{model.capitalize()} is {verdict.outcome} than {other}"
    change = f", a change of {signed(verdict.change)}" if verdict.change else ""
    return f"{outcome}: {metric} {verdict.value}, compared with {verdict.before}{change}."


def signed(change: Interval) -> str:
    """Return a change and its interval as text, with a sign on every number."""
    return minus(f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]")


def minus(text: str) -> str:
    """Return the text with each hyphen replaced by a true minus sign, which is as wide as a plus sign."""
    return text.replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """Return a duration as text, in seconds, minutes, or hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _plots(report: Report) -> dict[str, str]:
    plots = {
        "shares": plot_shares(report.judged.rows),
        "numbers": plot_numbers(report.judged.rows),
        "loss": plot_loss(report.curve),
        "learning_rate": plot_learning_rate(report.curve),
        "lengths": plot_lengths(report.data),
        "labels": plot_labels(report.data.labels, report.heldout_labels),
    }
    return {name: svg for name, svg in plots.items() if svg}


def _engines(manifest: Manifest) -> dict[str, EngineFacts]:
    """Return facts about the engine on which each format was evaluated, keyed by format."""
    return {format.value: record.probes[0].engine for format, record in manifest.formats.items() if record.probes}


def template_environment(folder: Path, *, autoescape: bool) -> "Environment":
    """Return a jinja environment for documents, with the filters of this module.

    Args:
        folder: folder with the templates.
        autoescape: whether inserted values are escaped for HTML.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=autoescape,  # noqa: S701 - a model card is Markdown, not HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (say_verdict, signed, minus, duration, cut_text, visible, place_of, signal_cells)
    environment.filters |= {function.__name__: function for function in filters}
    return environment
