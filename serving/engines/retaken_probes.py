"""Stores probes that were measured again for another kind of engine.

A version's probes are short token sequences with the log-probabilities by which the loaded weights are recognized. They
are first recorded when the version is qualified. Another kind of engine rounds differently, so it needs its own values.
"""

from pydantic import TypeAdapter
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.engine.probes import EngineFacts, Probe
from svc.store.database import exclusive
from svc.store.tables import RetakenProbesRow, target_columns
from svc.version import Target

_PROBES = TypeAdapter(tuple[Probe, ...])


def find_retaken_probes(store: Store, target: Target, facts: EngineFacts) -> tuple[Probe, ...] | None:
    """Return a version's probes as measured on the given kind of engine, or None if they were not measured there."""
    with Session(store) as session:
        row = session.get(RetakenProbesRow, target_columns(target) | {"engine": facts.key})
        return _PROBES.validate_json(row.probes) if row else None


def keep_retaken_probes(store: Store, target: Target, facts: EngineFacts, probes: tuple[Probe, ...]) -> None:
    """Store remeasured probes, so that later loads on this kind of engine can be checked against them."""
    text = _PROBES.dump_json(probes).decode("utf-8")
    with exclusive(store) as session:
        session.merge(RetakenProbesRow(**target_columns(target), engine=facts.key, probes=text))
