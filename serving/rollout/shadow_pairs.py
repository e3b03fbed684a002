"""Stored comparisons of two versions' answers to the same requests, from the shadow steps of rollouts."""

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.orm import Session

from svc.store.database import exclusive
from svc.store.tables import ShadowPairRow


@dataclass(frozen=True, slots=True)
class ShadowPair:
    """One request that both versions answered during the shadow step; texts are not stored.

    Attributes:
        unit: hash of the user or conversation; empty if unknown.
        production_valid, candidate_valid: whether the answer is JSON; None if JSON is not expected, or if
            either version failed.
        agrees: whether both answers are equal; None if either version failed.
        production_tokens, candidate_tokens: lengths of the answers; None if unknown.
        production_seconds, candidate_seconds: time until the answer was complete.
        production_logprob, candidate_logprob: mean log-probability of the tokens that the version sampled, in nats per
            token; None if unknown.
        replayed: row id of the stored request that was replayed; None for a copy of a live request.
    """

    unit: str
    production_failed: bool
    candidate_failed: bool
    production_valid: bool | None
    candidate_valid: bool | None
    agrees: bool | None
    production_finish: str | None
    candidate_finish: str | None
    production_tokens: int | None
    candidate_tokens: int | None
    production_seconds: float
    candidate_seconds: float
    production_logprob: float | None = None
    candidate_logprob: float | None = None
    replayed: int | None = None


def add_shadow_pair(store: Store, rollout: int, pair: ShadowPair) -> None:
    """Store a comparison of both versions' answers to one request, made in a rollout's shadow step."""
    with exclusive(store) as session:  # a reader that skips the rows it has read misses none
        session.add(ShadowPairRow.of(pair, rollout_id=rollout, at=datetime.now(UTC)))


def read_shadow_pairs(store: Store, rollout: int, *, skip: int = 0) -> list[ShadowPair]:
    """Return the requests compared in a rollout's shadow step, oldest first.

    Args:
        skip: number of oldest requests to leave out.
    """
    query = select(ShadowPairRow).where(ShadowPairRow.rollout_id == rollout).order_by(ShadowPairRow.id).offset(skip)
    with Session(store) as session:
        return [row.read(ShadowPair) for row in session.scalars(query)]
