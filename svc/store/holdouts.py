"""Runs of the held-out set on the engine that serves: what a version gives today for what it was judged by.

Figures of each example alone; its texts are in the registry. Judges nothing.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import ColumnElement, and_, delete, select
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.engine.probes import EngineFacts
from svc.store.tables import HoldoutRunRow
from svc.version import Format, Target, VersionId

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
    name = run.target.version.name
    row = HoldoutRunRow(
        name=name,
        number=run.target.version.number,
        format=run.target.format.value,
        engine=run.engine.key,
        cause=run.cause.value,
        started_at=run.started_at,
        ended_at=run.ended_at,
        outcome=run.outcome.value,
        reason=run.reason,
        results=json.dumps(
            {
                "places": run.places,
                "hits": [int(hit) for hit in run.hits],
                "nll": run.nll,
                "metric": run.metric,
                "scores": run.scores,
            }
        ),
    )
    newest = select(HoldoutRunRow.id).where(HoldoutRunRow.name == name).order_by(HoldoutRunRow.id.desc())
    with Session(store) as session, session.begin():
        session.add(row)
        session.flush()
        kept = newest.limit(KEPT_RUNS)
        session.execute(delete(HoldoutRunRow).where(HoldoutRunRow.name == name, HoldoutRunRow.id.not_in(kept)))


def newest_holdout_run(store: Store, target: Target, *, completed: bool = True) -> HoldoutRun | None:
    """The newest run of a version in a format.

    Args:
        completed: whether failed ones are passed over.
    """
    query = select(HoldoutRunRow).where(_is(target)).order_by(HoldoutRunRow.id.desc()).limit(1)
    if completed:
        query = query.where(HoldoutRunRow.outcome == HoldoutOutcome.COMPLETED.value)
    with Session(store) as session:
        row = session.scalar(query)
        return _run(row) if row else None


def first_holdout_run(store: Store, target: Target, engine: EngineFacts) -> HoldoutRun | None:
    """The oldest completed run of a version in a format on one kind of engine, of those that are kept."""
    query = (
        select(HoldoutRunRow)
        .where(_is(target), HoldoutRunRow.outcome == HoldoutOutcome.COMPLETED.value)
        .where(HoldoutRunRow.engine == engine.key)
        .order_by(HoldoutRunRow.id)
        .limit(1)
    )
    with Session(store) as session:
        row = session.scalar(query)
        return _run(row) if row else None


def _is(target: Target) -> ColumnElement[bool]:
    return and_(
        HoldoutRunRow.name == target.version.name,
        HoldoutRunRow.number == target.version.number,
        HoldoutRunRow.format == target.format.value,
    )


def _run(row: HoldoutRunRow) -> HoldoutRun:
    results = json.loads(row.results)
    return HoldoutRun(
        target=Target(VersionId(row.name, row.number), Format(row.format)),
        engine=EngineFacts.model_validate_json(row.engine),
        cause=HoldoutCause(row.cause),
        started_at=row.started_at,
        ended_at=row.ended_at,
        outcome=HoldoutOutcome(row.outcome),
        reason=row.reason,
        places=tuple(results["places"]),
        hits=tuple(bool(hit) for hit in results["hits"]),
        nll=tuple(float(value) for value in results["nll"]),
        metric=results["metric"],
        scores=tuple(float(value) for value in results["scores"]),
        id=row.id,
    )
