"""Which version of a name served when, and who asked for it."""

from dataclasses import dataclass

from sqlalchemy import Engine as Store

from svc.store.audit import Action, AuditEvent, read_events
from svc.store.served import ServedSpan, served_spans

_ASKING = {Action.SERVE.value, Action.PROMOTE.value, Action.ROLLBACK.value}
_EVENTS = 10_000


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A time in which a version served.

    Attributes:
        asked: the event by which somebody wanted it; None where the log has none.
    """

    span: ServedSpan
    asked: AuditEvent | None


def read_history(store: Store, name: str) -> list[HistoryEntry]:
    """All times of a name, in order."""
    events = read_events(store, newest=_EVENTS, subject=name)
    asked = {event.details.get("generation"): event for event in events if event.action in _ASKING}
    return [HistoryEntry(span, asked.get(span.generation)) for span in served_spans(store, name)]
