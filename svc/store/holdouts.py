"""Runs of the held-out set on the engine that serves: what a version gives today for what it was judged by.

Figures of each example alone; its texts are in the registry. Judges nothing.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import Engine as Store
from sqlalchemy import Select, delete, select
from sqlalchemy.orm import Session

from svc.engine.probes import EngineFacts
from svc.store.tables import HoldoutRunRow, is_of, target_columns, target_of
from svc.version import Target

_RESULTS = ("places", "hits", "nll", "metric", "scores")
KEPT_RUNS = 200
"""Of each name: the newest ones; at the default pace they go back 50 days."""


class HoldoutCause(StrEnum):
    """Why the set was asked."""

    START = "start"
    """An engine was started."""
    SWAP = "swap"
    """Weights were loaded into a running engine."""
    SCHEDULE = "schedule"
    """It was time again."""


class HoldoutOutcome(StrEnum):
    """How a run ended. One that a swap or the engine's death cut off is not kept."""

    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class HoldoutRun:
    """One run.

    Attributes:
        engine: the kind of engine that answered.
        reason: why it failed; None for a completed one.
        places: of the examples that were asked, in the held-out file and so among the registered results. None for a
            failed run.
        hits: whether the answer to each is its reference.
        nll: negative log-likelihood of each reference answer, nats a token.
        metric: name of the metric that `scores` are of; None for a failed run.
        scores: of each answer.
        id: of its row; None before it has one. A later row has a greater one.
    """

    target: Target
    engine: EngineFacts
    cause: HoldoutCause
    started_at: datetime
    ended_at: datetime
    outcome: HoldoutOutcome
    reason: str | None = None
    places: tuple[int, ...] = ()
    hits: tuple[bool, ...] = ()
    nll: tuple[float, ...] = ()
    metric: str | None = None
    scores: tuple[float, ...] = ()
    id: int | None = None


def add_holdout_run(store: Store, run: HoldoutRun) -> None:
    """Keeps a run, and forgets the oldest of its name beyond `KEPT_RUNS`."""
    results = json.dumps({name: getattr(run, name) for name in _RESULTS} | {"hits": [int(hit) for hit in run.hits]})
    of_name = HoldoutRunRow.name == run.target.version.name
    newest = select(HoldoutRunRow.id).where(of_name).order_by(HoldoutRunRow.id.desc()).limit(KEPT_RUNS)
    with Session(store) as session, session.begin():
        session.add(HoldoutRunRow.of(run, **target_columns(run.target), engine=run.engine.key, results=results))
        session.flush()
        session.execute(delete(HoldoutRunRow).where(of_name, HoldoutRunRow.id.not_in(newest)))


def newest_holdout_run(store: Store, target: Target, *, completed: bool = True) -> HoldoutRun | None:
    """The newest run of a version in a format.

    Args:
        completed: whether failed ones are passed over.
    """
    query = select(HoldoutRunRow).where(is_of(HoldoutRunRow, target)).order_by(HoldoutRunRow.id.desc())
    return _first(store, query.where(HoldoutRunRow.outcome == HoldoutOutcome.COMPLETED) if completed else query)


def first_holdout_run(store: Store, target: Target, engine: EngineFacts) -> HoldoutRun | None:
    """The oldest completed run of a version in a format on one kind of engine, of those that are kept."""
    completed = HoldoutRunRow.outcome == HoldoutOutcome.COMPLETED
    query = select(HoldoutRunRow).where(is_of(HoldoutRunRow, target), completed, HoldoutRunRow.engine == engine.key)
    return _first(store, query.order_by(HoldoutRunRow.id))


def _first(store: Store, query: Select[HoldoutRunRow]) -> HoldoutRun | None:
    with Session(store) as session:
        row = session.scalar(query.limit(1))
        if row is None:
            return None
        engine = EngineFacts.model_validate_json(row.engine)
        return row.read(HoldoutRun, target=target_of(row), engine=engine, **json.loads(row.results))
