"""Tests that held-out evaluations are found by their inputs, and that the oldest runs are deleted."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from svc.engine.probes import EngineFacts
from svc.settings.engine import Device, GptqKernel
from svc.store import holdouts
from svc.store.holdouts import (
    HoldoutCause,
    HoldoutOutcome,
    HoldoutRun,
    add_holdout_run,
    newest_holdout_run,
)
from svc.store.tables import HoldoutRunRow
from svc.version import Format, Target, VersionId
from tests.builders.requests import TARGET

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
COMPLETED = HoldoutRun(
    target=TARGET,
    engine=EngineFacts(
        vllm="0.32.0",
        device=Device.CPU,
        instruction_set="x86_64-avx2",
        mode="eager",
        dtype="bfloat16",
        kernel=GptqKernel.VLLM,
    ),
    cause=HoldoutCause.START,
    started_at=NOON,
    ended_at=NOON + timedelta(minutes=3),
    outcome=HoldoutOutcome.COMPLETED,
    places=(0, 2, 5),
    hits=(True, False, True),
    nll=(0.1234567890123456, 1e-300, 12.5),
)
FAILED = replace(COMPLETED, outcome=HoldoutOutcome.FAILED, reason="too long", places=(), hits=(), nll=())


def test_new_store_has_no_held_out_evaluation(store: Store) -> None:
    assert newest_holdout_run(store, TARGET) is None
    assert newest_holdout_run(store, TARGET, completed=False) is None


@pytest.mark.parametrize("cause", HoldoutCause)
def test_stored_held_out_evaluation_round_trips_exactly(store: Store, cause: HoldoutCause) -> None:
    run = replace(COMPLETED, cause=cause)
    add_holdout_run(store, run)
    found = newest_holdout_run(store, TARGET)
    assert found is not None
    assert found.id is not None
    assert replace(found, id=None) == run


def test_failed_held_out_evaluations_are_skipped_if_only_completed_runs_are_requested(store: Store) -> None:
    add_holdout_run(store, COMPLETED)
    add_holdout_run(store, FAILED)
    completed, last = newest_holdout_run(store, TARGET), newest_holdout_run(store, TARGET, completed=False)
    assert completed is not None and last is not None
    assert (completed.outcome, last.outcome, last.reason) == (
        HoldoutOutcome.COMPLETED,
        HoldoutOutcome.FAILED,
        "too long",
    )
    assert completed.id is not None and last.id is not None and completed.id < last.id


@pytest.mark.parametrize(
    "other",
    [
        Target(VersionId("tiny", 3), Format.GPTQ),
        Target(VersionId("other", 2), Format.GPTQ),
        Target(VersionId("tiny", 2), Format.MERGED),
    ],
)
def test_held_out_evaluations_of_a_different_version_or_format_are_excluded(store: Store, other: Target) -> None:
    add_holdout_run(store, replace(COMPLETED, target=other))
    assert newest_holdout_run(store, TARGET, completed=False) is None


def test_oldest_held_out_evaluations_of_a_model_are_deleted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdouts, "KEPT_RUNS", 3)
    other = replace(COMPLETED, target=Target(VersionId("other", 1), Format.GPTQ))
    add_holdout_run(store, other)
    for hour in range(5):
        version = VersionId("tiny", 1 + hour % 2)
        add_holdout_run(
            store, replace(COMPLETED, target=Target(version, Format.GPTQ), started_at=NOON + timedelta(hours=hour))
        )
    with Session(store) as session:
        of_tiny = session.scalars(select(HoldoutRunRow.started_at).where(HoldoutRunRow.name == "tiny")).all()
        assert of_tiny == [NOON + timedelta(hours=hour) for hour in (2, 3, 4)]
        assert session.scalar(select(func.count()).select_from(HoldoutRunRow)) == 4
