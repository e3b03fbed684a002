"""Held-out evaluations on the serving engine: a version's current results on its held-out examples.

Only per-example metrics are stored here. The texts are in the registry.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import Engine as Store
from sqlalchemy import Select, delete, select
from sqlalchemy.orm import Session

from svc.engine.probes import EngineFacts
from svc.store.database import exclusive
from svc.store.tables import HoldoutRunRow, is_of, target_columns, target_of
from svc.version import Target

_RESULTS = ("places", "hits", "nll", "metric", "scores")
KEPT_RUNS = 200
"""Number of runs to keep per model name, which cover 50 days at the default interval."""


class HoldoutCause(StrEnum):
    """Event that triggered the evaluation of a version on its held-out examples."""

    START = "start"
    """An engine has started."""
    SWAP = "swap"
    """New weights have been loaded into a running engine."""
    SCHEDULE = "schedule"
    """The configured interval since the last run has passed."""


class HoldoutOutcome(StrEnum):
    """Outcome of the evaluation of a version on its held-out examples. If a swap or the engine's death interrupts an
    evaluation, nothing is stored.
    """

    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class HoldoutRun:
    """A held-out evaluation: an evaluation of a served version on its held-out examples.

    Attributes:
        engine: kind of engine that answered.
        reason: why the run failed, or None if it completed.
        places: indices of the evaluated examples in the held-out file and in the registered results. Empty
            for a failed run.
        hits: whether each answer equals its reference answer.
        nll: negative log-likelihood of each reference answer, in nats per token.
        metric: name of the metric that produced `scores`, or None for a failed run.
        scores: score of each answer.
        id: row id of the run, larger for later runs, or None before the run is stored.
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
    """Store a held-out evaluation, and delete the model's oldest ones if there are more than `KEPT_RUNS`."""
    results = json.dumps({name: getattr(run, name) for name in _RESULTS} | {"hits": [int(hit) for hit in run.hits]})
    of_name = HoldoutRunRow.name == run.target.version.name
    newest = select(HoldoutRunRow.id).where(of_name).order_by(HoldoutRunRow.id.desc()).limit(KEPT_RUNS)
    with exclusive(store) as session:
        session.add(HoldoutRunRow.of(run, **target_columns(run.target), engine=run.engine.key, results=results))
        session.flush()
        session.execute(delete(HoldoutRunRow).where(of_name, HoldoutRunRow.id.not_in(newest)))


def newest_holdout_run(store: Store, target: Target, *, completed: bool = True) -> HoldoutRun | None:
    """Return the newest held-out evaluation of a version in a given format, or None if there is none.

    Args:
        completed: whether to skip failed runs.
    """
    query = select(HoldoutRunRow).where(is_of(HoldoutRunRow, target)).order_by(HoldoutRunRow.id.desc())
    return _first(store, query.where(HoldoutRunRow.outcome == HoldoutOutcome.COMPLETED) if completed else query)


def first_holdout_run(store: Store, target: Target, engine: EngineFacts) -> HoldoutRun | None:
    """Return the oldest completed held-out evaluation of a version in a given format on one kind of engine.

    The result is None if there is no such run.
    """
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
