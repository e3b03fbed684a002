"""Provides fine-tuned models as the worker leaves them: a version in the registry, and a job that has succeeded."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import count
from typing import Any

from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from serving.fine_tuning.recipe import registered_name
from serving.fine_tuning.rows import Job, Wanted
from serving.models.fine_tuned_rows import FineTunedModel
from svc.registry.registry import Registry
from svc.store.statuses import JobStatus
from svc.store.tables import JobRow
from svc.version import Format, VersionId
from tests.serving.versions import make_version

_NUMBERS = count(1)


def add_job(store: Store, *, owner: str, name: str = "ft-local-x", **fields: Any) -> Job:
    """Add a job that has succeeded with version 1 of a model, without the version."""
    number = next(_NUMBERS)
    defaults: dict[str, Any] = {
        "id": f"ftjob-{number:024x}",
        "fingerprint": f"print-{number}",
        "model": "small",
        "training_file": "file-1",
        "request": json.dumps({"model": "small", "training_file": "file-1"}),
        "recipe": "",
        "created_at": datetime.now(UTC),
        "finished_at": datetime.now(UTC),
        "status": JobStatus.SUCCEEDED,
        "wanted": Wanted.RUN,
        "number": 1,
        "fine_tuned_model": f"ft:small:org::{number:012x}",
    }
    job = Job(owner=owner, name=name, **(defaults | fields))
    with Session(store) as session, session.begin():
        session.add(JobRow.of(job, status=job.status.value, wanted=job.wanted.value))
    return job


def train(
    store: Store,
    registry: Registry,
    *,
    owner: str = "",
    suffix: str = "x",
    number: int = 1,
    formats: tuple[Format, ...] = (Format.MERGED, Format.ADAPTER),
    adapter: Mapping[str, Any] | None = None,
) -> FineTunedModel:
    """Register the version of an owner's job, and return its model."""
    version = VersionId(registered_name(owner, suffix), number)
    make_version(registry, number, name=version.name, formats=formats, adapter=adapter)
    job = add_job(store, owner=owner, name=version.name, number=number)
    assert job.fine_tuned_model and job.finished_at
    return FineTunedModel(job.fine_tuned_model, owner, version, job.finished_at)
