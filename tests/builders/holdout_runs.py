"""Builds runs of a held-out set."""

from collections.abc import Sequence
from datetime import UTC, datetime

from svc.engine.probes import EngineFacts
from svc.store.holdouts import HoldoutCause, HoldoutOutcome, HoldoutRun
from tests.monitoring.drift.traffic import target
from tests.serving.versions import FACTS

NOW = datetime(2026, 11, 2, tzinfo=UTC)


def run(nll: Sequence[float], hits: Sequence[bool], engine: EngineFacts = FACTS) -> HoldoutRun:
    """Return a completed run with these NLLs and hits."""
    return HoldoutRun(
        target=target(),
        engine=engine,
        cause=HoldoutCause.SWAP,
        started_at=NOW,
        ended_at=NOW,
        outcome=HoldoutOutcome.COMPLETED,
        places=tuple(range(len(nll))),
        hits=tuple(hits),
        nll=tuple(nll),
        metric="exact_match",
        scores=tuple(map(float, hits)),
    )
