"""A model's history: when each version was served, which rollouts took place, and who requested them."""

from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Engine as Store

from serving.rollout.served import ServedSpan, served_spans
from svc.store.audit import Action, read_events
from svc.store.gate_rows import GATE_ROWS
from svc.store.rollouts import RolloutView, read_rollouts

_REQUESTING = {Action.SERVE.value, Action.PROMOTE.value, Action.ROLLBACK.value}
_EVENTS = 10_000


def read_history(store: Store, name: str) -> list[dict[str, Any]]:
    """Return the periods in which a model was served, and its rollouts, as JSON, in chronological order.

    A served period is the time during which one version was served, by one or several servers.

    All rows have the same keys, and `event` is either `served` or `rollout`. For a served period, `action`,
    `who`, `why` and `gates` come from the audit event that requested the version. These values are None or empty if the
    log contains no such event.
    """
    return sorted(_served(store, name) + _rollouts(store, name), key=lambda row: str(row["from"]))


def _served(store: Store, name: str) -> list[dict[str, Any]]:
    events = read_events(store, newest=_EVENTS, subject=name)
    asked = {event.details.get("generation"): event for event in events if event.action in _REQUESTING}
    rows: list[dict[str, Any]] = []
    for span in _merged(served_spans(store, name)):
        event = asked.get(span.generation)
        rows.append(
            {
                "event": "served",
                "version": str(span.target.version),
                "format": span.target.format.value,
                "from": _text(span.began_at),
                "until": _text(span.ended_at),
                "began_by": span.began_by.value,
                "ended_by": span.ended_by.value if span.ended_by else None,
                "generation": span.generation,
                "action": event.action if event else None,
                "who": event.actor if event else None,
                "why": event.reason if event else None,
                "gates": event.details.get("gates", []) if event else [],
                "rollout": None,
            }
        )
    return rows


def _merged(spans: list[ServedSpan]) -> list[ServedSpan]:
    """Merge the overlapping spans of servers that served the same version.

    The spans of one server are not merged, so that its restarts stay visible.
    """
    merged: list[ServedSpan] = []
    for span in sorted(spans, key=lambda span: span.began_at):
        same = (at for at, each in enumerate(merged) if each.target == span.target and _goes_on(each, span))
        place = next(same, None)
        if place is None:
            merged.append(span)
        else:
            merged[place] = _joined(merged[place], span)
    return merged


def _goes_on(earlier: ServedSpan, later: ServedSpan) -> bool:
    """Return whether two serving periods overlap and belong to different servers."""
    if earlier.server == later.server:
        return False
    return earlier.ended_by is None or (earlier.ended_at is not None and earlier.ended_at > later.began_at)


def _joined(earlier: ServedSpan, later: ServedSpan) -> ServedSpan:
    """Return a span that covers two overlapping spans and ends when both of them have ended."""
    last = max(earlier, later, key=lambda span: (span.ended_by is None, span.ended_at or span.began_at))
    return replace(earlier, ended_at=last.ended_at, ended_by=last.ended_by, server=last.server)


def _rollouts(store: Store, name: str) -> list[dict[str, Any]]:
    return [
        {
            "event": "rollout",
            "version": str(record.target.version),
            "format": record.target.format.value,
            "from": _text(record.requested_at),
            "until": _text(record.ended_at),
            "began_by": "rollout",
            "ended_by": record.outcome.value if record.outcome else None,
            "generation": record.generation,
            "action": Action.ROLLOUT.value,
            "who": record.actor,
            "why": record.reason,
            "gates": GATE_ROWS.dump_python(record.gates, mode="json"),
            "rollout": RolloutView.of(record).model_dump(mode="json"),
        }
        for record in read_rollouts(store, name)
    ]


def _text(moment: datetime | None) -> str | None:
    return moment.isoformat(timespec="milliseconds") if moment else None
