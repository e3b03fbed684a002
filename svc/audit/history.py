"""A model's history: which version was served when, and who requested it."""

from typing import Any

from sqlalchemy import Engine as Store

from svc.store.audit import Action, read_events
from svc.store.served import served_spans

_REQUESTING = {Action.SERVE.value, Action.PROMOTE.value, Action.ROLLBACK.value}
_EVENTS = 10_000


def read_history(store: Store, name: str) -> list[dict[str, Any]]:
    """Return each period in which a version of a name was served, in chronological order, as JSON.

    `action`, `who`, `why` and `gates` come from the event that requested the version. They are None or empty if the
    log has no such event.
    """
    events = read_events(store, newest=_EVENTS, subject=name)
    asked = {event.details.get("generation"): event for event in events if event.action in _REQUESTING}
    rows = []
    for span in served_spans(store, name):
        event = asked.get(span.generation)
        rows.append(
            {
                "version": str(span.target.version),
                "format": span.target.format.value,
                "from": span.began_at.isoformat(timespec="milliseconds"),
                "until": span.ended_at.isoformat(timespec="milliseconds") if span.ended_at else None,
                "began_by": span.began_by.value,
                "ended_by": span.ended_by.value if span.ended_by else None,
                "generation": span.generation,
                "action": event.action if event else None,
                "who": event.actor if event else None,
                "why": event.reason if event else None,
                "gates": event.details.get("gates", []) if event else [],
            }
        )
    return rows
