"""Which version of a name served when, and who asked for it.

Spans are written by the server. Those of before this was written down are read out of the journal of swaps: from the
moment in which a version took the place of another one.
"""

from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import Engine as Store

from svc.store.audit import Action, AuditEvent, read_events
from svc.store.served import Began, Ended, ServedSpan, served_spans
from svc.store.swaps import succeeded_swaps

_ASKING = {Action.SERVE.value, Action.PROMOTE.value, Action.ROLLBACK.value}
_EVENTS = 10_000


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A time in which a version served.

    Attributes:
        asked: the event by which somebody wanted it; None where the log has none, as for what an older release did.
    """

    span: ServedSpan
    asked: AuditEvent | None


def read_history(store: Store, name: str) -> list[HistoryEntry]:
    """All times of a name, in order."""
    spans = served_spans(store, name)
    events = read_events(store, newest=_EVENTS, subject=name)
    asked = {event.details.get("generation"): event for event in events if event.action in _ASKING}
    found = [*_of_swaps(store, name, before=spans[0].began_at if spans else None), *spans]
    return [HistoryEntry(span, asked.get(span.generation)) for span in found]


def _of_swaps(store: Store, name: str, before: datetime | None) -> list[ServedSpan]:
    """What the journal of swaps knows of the time before the first span."""
    spans: list[ServedSpan] = []
    for swap, ended_at in succeeded_swaps(store, name):
        if before is not None and ended_at >= before:
            break
        if spans:
            spans[-1] = replace(spans[-1], ended_at=ended_at, ended_by=Ended.SWAP)
        spans.append(ServedSpan(swap.target, swap.generation, ended_at, Began.SWAP, None, None))
    if spans and before is not None:
        spans[-1] = replace(spans[-1], ended_at=before, ended_by=Ended.LOST)
    return spans
