"""Formats the output of `svc drift` as text and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from monitoring.drift.alarms import MOVED
from monitoring.drift.budget import Signal
from monitoring.drift.domain_classifier import CLASSIFIER
from monitoring.drift.quality import Quality, QualityReport
from monitoring.drift.report import SignalReport, Status
from monitoring.drift.rows import DriftAlarm
from svc.version import Target

_SHOWN_CHARS = 160
_TIME = "%Y-%m-%d %H:%M"
_COLOURS = {
    Status.OFF: "yellow",
    Status.WAITING: "dim",
    Status.UNWATCHED: "yellow",
    Status.STEADY: "green",
    Status.ALARM: "red",
}


@dataclass(frozen=True, slots=True)
class Example:
    """An example request that shows the change behind an alarm.

    Attributes:
        prompt: the request's last user message.
    """

    prompt: str
    answer: str


def drift_screen(
    target: Target,
    reports: Sequence[SignalReport],
    quality: QualityReport,
    alarms: Sequence[DriftAlarm],
    examples: Mapping[str, Example],
) -> RenderableType:
    """Render the report that `svc drift` prints.

    Args:
        alarms: the alarms, newest first.
        examples: example requests that are still stored, keyed by request id.
    """
    parts: list[RenderableType] = [
        Text.assemble((str(target), "bold"), ": live traffic compared with the version's examples")
    ]
    parts += [_status(report) for report in reports]
    parts.append(_quality(quality))
    if any(report.lines for report in reports):
        parts.append(_table(reports))
    lasting = [alarm for alarm in alarms if alarm.ended_at is None]
    parts += [_alarm(alarm, examples) for alarm in lasting]
    if alarms and not lasting:
        last = alarms[0]
        time = f"{last.called_at:{_TIME}} to {last.ended_at:{_TIME}}"
        parts.append(Text(f"last alarm: {last.signal}, {last.feature}, {time}"))
    return Group(*parts)


def drift_json(
    target: Target,
    reports: Sequence[SignalReport],
    quality: QualityReport,
    alarms: Sequence[DriftAlarm],
    examples: Mapping[str, Example],
) -> dict[str, Any]:
    """Return the JSON output of `svc drift`, including all stored alarms."""
    return {
        "version": str(target.version),
        "format": target.format.value,
        "signals": [asdict(report) for report in reports],
        "quality": asdict(quality),
        "alarms": [
            {
                "signal": alarm.signal,
                "feature": alarm.feature,
                "since": alarm.since.isoformat(),
                "called_at": alarm.called_at.isoformat(),
                "ended_at": alarm.ended_at and alarm.ended_at.isoformat(),
                "moved": asdict(MOVED.validate_json(alarm.moved)),
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
    notes = [*(f"{alarm.feature} since {alarm.since:{_TIME}}" for alarm in report.alarms), report.why]
    if report.uncompared and report.status is not Status.UNWATCHED:
        notes.append(f"features without values to compare: {', '.join(report.uncompared)}")
    if any(notes):
        text.append(f": {'; '.join(note for note in notes if note)}")
    if report.items:
        newest = f", newest {report.newest_at:{_TIME}}" if report.newest_at else ""
        text.append(f"  ({report.items} {unit} compared{newest})", "dim")
    return text


def _quality(report: QualityReport) -> Text:
    colors = {Quality.UNKNOWN: "yellow", Quality.AS_REGISTERED: "green", Quality.CHANGED: "red"}
    text = Text.assemble("quality ", (report.quality.value.replace("_", " "), colors[report.quality]))
    if report.why:
        return text.append(f": {report.why}")
    text.append(
        f": NLL {report.nll:.3f}, was {report.registered_nll:.3f} (p {_p(report.nll_p)});"
        f" {report.metric.replace('_', ' ')} {report.score:.3f}, was {report.registered_score:.3f}"
        f" (p {_p(report.score_p)})"
    )
    return text.append(f"  ({report.examples} held-out examples, {report.asked_at:{_TIME}})", "dim")


def _table(reports: Sequence[SignalReport]) -> Table:
    table = Table("signal", "feature", "evidence", "difference", "examples", "live", "newest", box=None)
    for report in reports:
        alarmed = {alarm.feature for alarm in report.alarms}
        for line in sorted(report.lines, key=lambda line: -line.evidence):
            unit = "AUC" if line.name == CLASSIFIER else "PSI"
            table.add_row(
                report.signal.value,
                line.name,
                Text("alarm", "red") if line.name in alarmed else f"{line.evidence:.0%}",
                f"{unit} {line.score:.2f}",
                line.expected,
                line.live,
                str(report.window),
            )
    return table


def _alarm(alarm: DriftAlarm, examples: Mapping[str, Example]) -> RenderableType:
    lines = [Text(f"{alarm.signal}, {alarm.feature} since {alarm.since:{_TIME}}, for example:", "bold")]
    for id in alarm.examples:
        example = examples.get(id, Example("(not stored)", "(not stored)"))
        text = example.answer if alarm.signal == Signal.OUTPUT else example.prompt
        shown = " ".join(text.split())[:_SHOWN_CHARS]
        lines.append(Text.assemble((f"  {id}  ", "dim"), shown, no_wrap=True, overflow="ellipsis"))
    return Group(*lines)


def _p(value: float) -> str:
    return f"{value:.2g}"
