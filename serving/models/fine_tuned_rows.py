"""Fine-tuned models: the results of jobs that have succeeded, with their names and owners."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine as Store
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from serving.models.checkpoint_versions import checkpoint_version, job_of_checkpoints
from serving.models.fine_tuned_name import PREFIX, parse_fine_tuned_name
from svc.errors import NotFoundError
from svc.store.audit import AuditEntry, append_event
from svc.store.database import exclusive
from svc.store.statuses import JobStatus
from svc.store.tables import JobCheckpointRow, JobRow
from svc.version import VersionId


@dataclass(frozen=True, slots=True)
class FineTunedModel:
    """A fine-tuned model.

    Attributes:
        name: the model's name for clients, `ft:...`.
        owner: id of the key whose job trained the model; empty for requests without a key.
        version: the version that has this name.
        created_at: when the job ended.
    """

    name: str
    owner: str
    version: VersionId
    created_at: datetime


def find_model(store: Store, name: str) -> FineTunedModel | None:
    """Return the fine-tuned model or checkpoint with the given client name or version, or None if no job has trained
    such a model.

    Args:
        name: `ft:...` or `NAME@N`. It must not contain characters that the database rejects.
    """
    parsed = parse_fine_tuned_name(name)
    if parsed is not None and parsed.step is not None:
        return _find_checkpoint(store, name)
    query = select(JobRow).where(JobRow.status == JobStatus.SUCCEEDED.value, JobRow.fine_tuned_model.is_not(None))
    if name.startswith(PREFIX):
        query = query.where(JobRow.fine_tuned_model == name)
    else:
        try:
            version = VersionId.parse(name)
        except NotFoundError:
            return None
        query = query.where(JobRow.name == version.name, JobRow.number == version.number)
    with Session(store) as session:
        row = session.scalar(query.limit(1))
        return None if row is None else _model(row)


def read_models(store: Store, owner: str | None) -> list[FineTunedModel]:
    """Return an owner's fine-tuned models, newest first.

    Args:
        owner: id of the owner, or None for the models of all owners.
    """
    query = select(JobRow).where(JobRow.status == JobStatus.SUCCEEDED.value, JobRow.fine_tuned_model.is_not(None))
    if owner is not None:
        query = query.where(JobRow.owner == owner)
    with Session(store) as session:
        rows = session.scalars(query.order_by(JobRow.finished_at.desc(), JobRow.id))
        return [model for row in rows if (model := _model(row))]


def delete_model(store: Store, model: FineTunedModel, entry: AuditEntry) -> None:
    """Delete a fine-tuned model or a checkpoint, so that requests no longer find it. Its version stays in the
    registry.

    Args:
        entry: the audit event, which is recorded only once even if the model is deleted twice.
    """
    with exclusive(store) as session:
        if row := session.scalar(select(JobRow).where(JobRow.fine_tuned_model == model.name)):
            row.fine_tuned_model = None
            append_event(session, entry)
        elif checkpoint := session.scalar(select(JobCheckpointRow).where(JobCheckpointRow.model == model.name)):
            session.delete(checkpoint)
            append_event(session, entry)


def owners_of(store: Store, name: str) -> frozenset[str]:
    """Return the owners of the jobs that register versions or checkpoints under a name. The result is empty if there
    are no such jobs.
    """
    registers = or_(JobRow.name == name, JobRow.id == job_of_checkpoints(name))
    with Session(store) as session:
        return frozenset(session.scalars(select(JobRow.owner).where(registers)))


def _find_checkpoint(store: Store, name: str) -> FineTunedModel | None:
    query = select(JobCheckpointRow, JobRow.owner).join(JobRow, JobRow.id == JobCheckpointRow.job)
    with Session(store) as session:
        found = session.execute(query.where(JobCheckpointRow.model == name).limit(1)).one_or_none()
        if found is None:
            return None
        checkpoint, owner = found
        version = checkpoint_version(checkpoint.job, checkpoint.step)
        return FineTunedModel(name, owner, version, checkpoint.created_at)


def _model(job: JobRow) -> FineTunedModel | None:
    if job.number is None or job.fine_tuned_model is None:
        return None
    version = VersionId(job.name, job.number)
    return FineTunedModel(job.fine_tuned_model, job.owner, version, job.finished_at or job.created_at)
