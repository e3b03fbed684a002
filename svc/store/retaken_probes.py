"""Probes that were measured again on a kind of engine other than the one on which the version was
qualified."""

from pydantic import TypeAdapter
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.engine.probes import EngineFacts, Probe
from svc.store.database import exclusive
from svc.store.tables import RetakenProbesRow, target_columns
from svc.version import Target

_PROBES = TypeAdapter(tuple[Probe, ...])


def find_retaken_probes(store: Store, target: Target, facts: EngineFacts) -> tuple[Probe, ...] | None:
    """Return a version's probes as remeasured on the given kind of engine, or None if that has not been done yet."""
    with Session(store) as session:
        row = session.get(RetakenProbesRow, target_columns(target) | {"engine": facts.key})
        return _PROBES.validate_json(row.probes) if row else None


def keep_retaken_probes(store: Store, target: Target, facts: EngineFacts, probes: tuple[Probe, ...]) -> None:
    """Store remeasured probes, so that later loads on this engine kind can be checked against them."""
    text = _PROBES.dump_json(probes).decode("utf-8")
    with exclusive(store) as session:
        session.merge(RetakenProbesRow(**target_columns(target), engine=facts.key, probes=text))
