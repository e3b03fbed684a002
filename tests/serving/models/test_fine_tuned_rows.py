"""Tests the fine-tuned models in the store."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine as Store

from serving.fine_tuning.rows import JobCheckpoint, add_checkpoint, find_job
from serving.models.checkpoint_versions import checkpoint_version
from serving.models.fine_tuned_rows import delete_model, find_model, owners_of, read_models
from svc.store import audit
from svc.store.audit import Action, AuditEntry
from svc.store.statuses import JobStatus
from svc.version import VersionId
from tests.builders.actors import ALICE_KEY
from tests.serving.trained import add_job

ENTRY = AuditEntry(Action.DELETE_MODEL, "ft:x", ALICE_KEY)


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


def test_fine_tuned_model_can_be_looked_up_by_model_name_or_version_id(store: Store) -> None:
    job = add_job(store, owner="alice", name="ft-alice-x", number=3)
    assert job.fine_tuned_model
    model = find_model(store, job.fine_tuned_model)
    assert model is not None
    assert (model.owner, model.version) == ("alice", VersionId("ft-alice-x", 3))
    assert find_model(store, "ft-alice-x@3") == model


@pytest.mark.parametrize("name", ["", "ft:", "ft:small:org::0", "ft-alice-x", "ft-alice-x@4", "ft-alice-x@0", "@1"])
def test_names_that_belong_to_no_fine_tuned_model_are_not_found(store: Store, name: str) -> None:
    add_job(store, owner="alice", name="ft-alice-x", number=3)
    assert find_model(store, name) is None


@pytest.mark.parametrize("fields", [{"status": JobStatus.RUNNING}, {"status": JobStatus.FAILED}, {"number": None}])
def test_job_without_a_result_has_no_model(store: Store, fields: dict[str, Any]) -> None:
    add_job(store, owner="alice", name="ft-alice-x", fine_tuned_model="ft:small:org::1", **fields)
    assert find_model(store, "ft:small:org::1") is None
    assert find_model(store, "ft-alice-x@1") is None
    assert read_models(store, "alice") == []


def test_fine_tuned_models_of_an_owner_are_listed_newest_first(store: Store) -> None:
    now = datetime.now(UTC)
    jobs = [add_job(store, owner="alice", finished_at=now + timedelta(seconds=second)) for second in (1, 3, 2)]
    other = add_job(store, owner="bob", finished_at=now)
    names = [jobs[at].fine_tuned_model for at in (1, 2, 0)]
    assert [model.name for model in read_models(store, "alice")] == names
    assert [model.name for model in read_models(store, None)] == [*names, other.fine_tuned_model]


def test_checkpoint_is_a_model_of_the_job_owner_until_the_checkpoint_is_deleted(store: Store) -> None:
    job = add_job(store, owner="alice")
    name = f"{job.fine_tuned_model}:ckpt-step-5"
    add_checkpoint(store, JobCheckpoint("ftckpt_1", job.id, datetime.now(UTC), 5, name, "{}"))
    model = find_model(store, name)
    assert model is not None
    assert (model.owner, model.version) == ("alice", checkpoint_version(job.id, 5))
    assert owners_of(store, model.version.name) == {"alice"}
    assert [each.name for each in read_models(store, "alice")] == [job.fine_tuned_model]
    delete_model(store, model, ENTRY)
    assert find_model(store, name) is None
    assert find_model(store, job.fine_tuned_model or "") is not None


def test_deleted_fine_tuned_model_is_not_found_but_its_job_is_kept(store: Store) -> None:
    job = add_job(store, owner="alice", name="ft-alice-x")
    (model,) = read_models(store, "alice")
    for _ in range(2):
        delete_model(store, model, ENTRY)
    assert find_model(store, model.name) is None
    assert find_model(store, "ft-alice-x@1") is None
    assert find_job(store, job.id, "alice").version == VersionId("ft-alice-x", 1)
    assert [event.action for event in audit.read_events(store, newest=10)] == ["model.delete"]
