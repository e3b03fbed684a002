"""Drift as a person reads it, and as a machine does."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from monitoring.drift.check import MOVED
from monitoring.drift.report import SignalReport, Status
from monitoring.drift.signals import CLASSIFIER
from monitoring.drift.two_sample.alpha_spending import Signal
from monitoring.drift.two_sample.univariate import false_discovery_rates
from monitoring.quality import Quality, QualityReport
from svc.store.drift import DriftAlarm
from svc.version import Target

FALSE_DISCOVERIES = 0.05
"""Of the features that are marked as moved, so many are marked falsely, on average."""
_SHOWN_CHARS = 160
_TIME = "%Y-%m-%d %H:%M"
_COLOURS = {Status.OFF: "yellow", Status.WAITING: "dim", Status.STEADY: "green", Status.ALARM: "red"}


@dataclass(frozen=True, slots=True)
class Example:
    """A request by which an alarm is seen.

    Attributes:
        prompt: the last user turn.
    """

    prompt: str
    answer: str


def moved_features(reports: Sequence[SignalReport]) -> set[tuple[Signal, str]]:
    """Signal and name of the lines that have moved, by Benjamini and Hochberg's procedure over all of all signals."""
    lines = [(report.signal, line) for report in reports for line in report.lines]
    rates = false_discovery_rates([line.p for _, line in lines])
    return {(signal, line.name) for (signal, line), rate in zip(lines, rates, strict=True) if rate <= FALSE_DISCOVERIES}


def drift_screen(
    target: Target,
    reports: Sequence[SignalReport],
    quality: QualityReport,
    alarms: Sequence[DriftAlarm],
    examples: Mapping[str, Example],
) -> RenderableType:
    """What `svc drift` shows.

    Args:
        alarms: the newest first.
        examples: requests by their ids, of those that are still kept.
    """
    parts: list[RenderableType] = [
        Text.assemble((str(target), "bold"), ": live traffic against the version's examples")
    ]
    parts += [_status(report) for report in reports]
    parts.append(_quality(quality))
    if any(report.lines for report in reports):
        parts.append(_table(reports))
    lasting = [alarm for alarm in alarms if alarm.ended_at is None]
    parts += [_alarm(alarm, examples) for alarm in lasting]
    if alarms and not lasting:
        last = alarms[0]
        parts.append(Text(f"last alarm: {last.signal}, {last.called_at:{_TIME}} to {last.ended_at:{_TIME}}"))
    return Group(*parts)


def drift_json(
    target: Target,
    reports: Sequence[SignalReport],
    quality: QualityReport,
    alarms: Sequence[DriftAlarm],
    examples: Mapping[str, Example],
) -> dict[str, Any]:
    """The same for machines, with all alarms that are kept: the signal for later use."""
    moved = moved_features(reports)
    return {
        "version": str(target.version),
        "format": target.format.value,
        "signals": [
            {
                **asdict(report),
                "lines": [{**asdict(line), "moved": (report.signal, line.name) in moved} for line in report.lines],
            }
            for report in reports
        ],
        "quality": asdict(quality),
        "alarms": [
            {
                "signal": alarm.signal,
                "since": alarm.since.isoformat(),
                "called_at": alarm.called_at.isoformat(),
                "ended_at": alarm.ended_at and alarm.ended_at.isoformat(),
                "moved": [asdict(found) for found in MOVED.validate_json(alarm.moved)],
                "examples": [
                    {"request_id": id, **(asdict(examples[id]) if id in examples else {})} for id in alarm.examples
                ],
            }
            for alarm in alarms
        ],
    }


def _status(report: SignalReport) -> Text:
    unit = "ratings" if report.signal is Signal.PEOPLE else "requests"
    text = Text.assemble(f"{report.signal:8}", (report.status.value, _COLOURS[report.status]))
    if report.status is Status.ALARM:
        since = f" since {report.alarm_since:{_TIME}}" if report.alarm_since else ""
        text.append(f"{since}: {', '.join(report.moved)}")
    if report.why:
        text.append(f": {report.why}")
    if report.items:
        newest = f", the newest {report.newest_at:{_TIME}}" if report.newest_at else ""
        text.append(f"  ({report.items} {unit} seen{newest})", "dim")
    return text


def _quality(report: QualityReport) -> Text:
    colours = {Quality.UNKNOWN: "yellow", Quality.AS_REGISTERED: "green", Quality.CHANGED: "red"}
    text = Text.assemble("quality ", (report.quality.value.replace("_", " "), colours[report.quality]))
    if report.why:
        return text.append(f": {report.why}")
    text.append(
        f": NLL {report.nll:.3f}, was {report.registered_nll:.3f} (p {_p(report.nll_p)});"
        f" {report.metric.replace('_', ' ')} {report.score:.3f}, was {report.registered_score:.3f}"
        f" (p {_p(report.score_p)})"
    )
    return text.append(f"  ({report.examples} held-out examples, {report.asked_at:{_TIME}})", "dim")


def _table(reports: Sequence[SignalReport]) -> Table:
    moved = moved_features(reports)
    table = Table("signal", "feature", "moved", "score", "p", "held out", "live", "window", box=None)
    for report in reports:
        for line in sorted(report.lines, key=lambda line: line.p):
            is_moved = (report.signal, line.name) in moved
            unit = "AUC" if line.name == CLASSIFIER else "PSI"
            table.add_row(
                report.signal.value,
                line.name,
                Text("moved", "red") if is_moved else "",
                f"{unit} {line.score:.2f}",
                _p(line.p),
                line.expected,
                line.live,
                str(report.window),
            )
    return table


def _alarm(alarm: DriftAlarm, examples: Mapping[str, Example]) -> RenderableType:
    typical = "most typical of what is new" if alarm.signal == Signal.INPUT else "the newest"
    lines = [Text(f"{alarm.signal} since {alarm.since:{_TIME}}, {typical}:", "bold")]
    for id in alarm.examples:
        example = examples.get(id, Example("(not kept)", "(not kept)"))
        text = example.answer if alarm.signal == Signal.OUTPUT else example.prompt
        shown = " ".join(text.split())[:_SHOWN_CHARS]
        lines.append(Text.assemble((f"  {id}  ", "dim"), shown, no_wrap=True, overflow="ellipsis"))
    return Group(*lines)


def _p(value: float) -> str:
    return f"{value:.2g}"
