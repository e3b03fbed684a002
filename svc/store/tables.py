"""The database tables. Change them only together with a migration (svc/store/migrations).

`Table.of` and `Table.read` convert between rows and other modules' records, matching fields by name.
"""

from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime
from functools import cache
from typing import Any, Self, TypeVar

import sqlalchemy as sa
from pydantic import TypeAdapter
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from svc.version import Format, Target, VersionId

Record = TypeVar("Record")


class StoredText(sa.TypeDecorator[str]):
    """Column type for texts. NUL, which PostgreSQL rejects, and lone surrogates are stored as question marks."""

    impl = sa.String
    cache_ok = True
    python_type = str

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Replace characters that a database cannot store."""
        return None if value is None else storable_text(value)


def storable_text(text: str) -> str:
    """Return a text with question marks in place of NULs and lone surrogates, which not every database can store."""
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("\0", "?")


class UtcDateTime(sa.TypeDecorator[datetime]):
    """Column type for points in time, which are stored and read back in UTC. SQLite stores no time zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True
    python_type = datetime

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert a value to UTC before it is written to the database."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Attach the UTC time zone to a value read from SQLite, and convert other databases' values to UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Table(DeclarativeBase):
    """Base class of all tables in the store."""

    metadata = sa.MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it from the class
        datetime: UtcDateTime,
        float: sa.Double,
        # SQLite's integers have 64 bits too, but it numbers rows only if their id is declared as INTEGER.
        int: sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
        str: StoredText,
    }

    @classmethod
    def of(cls, record: object, **others: Any) -> Self:
        """Create a row from a record.

        Args:
            others: values of columns that the record lacks or stores in a different form.
        """
        columns = {column.name for column in cls.__table__.columns if hasattr(record, column.name)}
        return cls(**{name: getattr(record, name) for name in columns - others.keys()}, **others)

    def read(self, kind: Callable[..., Record], **others: Any) -> Record:
        """Create a record from this row, letting pydantic convert the columns to the types of the record's fields.

        Args:
            kind: dataclass of the record.
            others: values of fields that have no column, or whose column stores a different form.
        """
        adapter, names = _reader(kind)
        record: Record = adapter.validate_python({name: getattr(self, name) for name in names - others.keys()} | others)
        return record


@cache
def _reader(kind: Any) -> tuple[TypeAdapter[Any], frozenset[str]]:
    return TypeAdapter(kind), frozenset(field.name for field in fields(kind))


class TargetRow:
    """First columns of a row that belongs to a version in a given format. Columns that precede them in a table have a
    smaller `sort_order`.
    """

    name: Mapped[str] = mapped_column(sort_order=-1)
    number: Mapped[int] = mapped_column(sort_order=-1)
    format: Mapped[str] = mapped_column(sort_order=-1)


class TargetKeyRow(TargetRow):
    """The same columns in a primary key."""

    name: Mapped[str] = mapped_column(primary_key=True, sort_order=-1)
    number: Mapped[int] = mapped_column(primary_key=True, sort_order=-1)
    format: Mapped[str] = mapped_column(primary_key=True, sort_order=-1)


class DesiredRow(Table):
    """Desired version of a model. `generation` increases with every change, so that writes based on an outdated
    state are detected.
    """

    __tablename__ = "desired"

    name: Mapped[str] = mapped_column(primary_key=True)
    generation: Mapped[int]
    number: Mapped[int]
    format: Mapped[str]
    previous_number: Mapped[int | None]
    previous_format: Mapped[str | None]
    changed_at: Mapped[datetime]
    forced: Mapped[str | None]


class DeploymentRow(Table):
    """A model to serve. Its desired state says which version to serve."""

    __tablename__ = "deployments"

    name: Mapped[str] = mapped_column(primary_key=True)
    added_at: Mapped[datetime]


class ServerRow(Table):
    """A server that uses the store; see svc.store.leases."""

    __tablename__ = "servers"

    id: Mapped[str] = mapped_column(primary_key=True)
    address: Mapped[str]
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]


class LeaseRow(Table):
    """A lease for work that only one server may do, with its holder and expiry time; see svc.store.leases."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    generation: Mapped[int]
    until: Mapped[datetime]


class SwapRow(TargetRow, Table):
    """One attempt to load a desired version into the engine. If it has no outcome, it is still running or was
    interrupted.
    """

    __tablename__ = "swaps"

    id: Mapped[int] = mapped_column(primary_key=True, sort_order=-2)
    server: Mapped[str] = mapped_column(
        default="", server_default="", sort_order=-2
    )  # empty if no other server can use the store
    name: Mapped[str] = mapped_column(sort_order=-2)
    generation: Mapped[int] = mapped_column(sort_order=-2)
    started_at: Mapped[datetime]
    outcome: Mapped[str | None]
    reason: Mapped[str | None]
    queued_s: Mapped[float | None]
    running: Mapped[int | None]
    queued: Mapped[int | None]
    kind: Mapped[str | None]
    took_s: Mapped[float | None]


class SwapStepRow(Table):
    """One step of a swap. Commands read these rows to follow the swap's progress."""

    __tablename__ = "swap_steps"

    id: Mapped[int] = mapped_column(primary_key=True)
    swap_id: Mapped[int] = mapped_column(sa.ForeignKey("swaps.id"), index=True)
    at: Mapped[datetime]
    text: Mapped[str]


class RolloutRow(TargetRow, Table):
    """One promotion through shadow and canary steps. `plan`, `signals` and `gates` are JSON."""

    __tablename__ = "rollouts"

    id: Mapped[int] = mapped_column(primary_key=True, sort_order=-2)
    name: Mapped[str] = mapped_column(index=True, sort_order=-2)
    previous_number: Mapped[int]
    previous_format: Mapped[str]
    generation: Mapped[int]
    plan: Mapped[str]
    state: Mapped[str]
    step: Mapped[int]
    requested_at: Mapped[datetime]
    step_began_at: Mapped[datetime]
    actor: Mapped[str]
    origin: Mapped[str]
    reason: Mapped[str | None]
    forced: Mapped[str | None]
    stop: Mapped[str | None]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None]
    why: Mapped[str | None]
    signals: Mapped[str]
    gates: Mapped[str]


class RolloutStepRow(Table):
    """One step of a rollout. Commands read these rows to follow the rollout's progress."""

    __tablename__ = "rollout_steps"

    id: Mapped[int] = mapped_column(primary_key=True)
    rollout_id: Mapped[int] = mapped_column(sa.ForeignKey("rollouts.id"), index=True)
    at: Mapped[datetime]
    text: Mapped[str]


class WebhookDeliveryRow(Table):
    """A webhook message that its receiver has not accepted yet."""

    __tablename__ = "webhook_deliveries"

    id: Mapped[int] = mapped_column(primary_key=True)
    message: Mapped[str]
    url: Mapped[str]
    body: Mapped[str]
    created_at: Mapped[datetime]
    attempts: Mapped[int]
    due_at: Mapped[datetime]


class ShadowPairRow(Table):
    """One request that both versions answered during the shadow step. Its text is not stored."""

    __tablename__ = "shadow_pairs"

    id: Mapped[int] = mapped_column(primary_key=True)
    rollout_id: Mapped[int] = mapped_column(sa.ForeignKey("rollouts.id"), index=True)
    at: Mapped[datetime]
    unit: Mapped[str]
    production_failed: Mapped[bool]
    candidate_failed: Mapped[bool]
    production_valid: Mapped[bool | None]
    candidate_valid: Mapped[bool | None]
    agrees: Mapped[bool | None]
    production_finish: Mapped[str | None]
    candidate_finish: Mapped[str | None]
    production_tokens: Mapped[int | None]
    candidate_tokens: Mapped[int | None]
    production_seconds: Mapped[float]
    candidate_seconds: Mapped[float]
    production_logprob: Mapped[float | None]
    candidate_logprob: Mapped[float | None]
    replayed: Mapped[int | None]


class RetakenProbesRow(TargetKeyRow, Table):
    """A version's probes, measured again on a kind of engine other than the one on which the version was qualified; see
    svc.engine.probes.
    """

    __tablename__ = "retaken_probes"

    engine: Mapped[str] = mapped_column(primary_key=True)
    probes: Mapped[str]


class RequestRow(Table):
    """One finished request. `bytes` is the row's approximate size, used for size-based retention."""

    __tablename__ = "requests"

    id: Mapped[int] = mapped_column(primary_key=True)
    request_id: Mapped[str] = mapped_column(index=True)
    started_at: Mapped[datetime] = mapped_column(index=True)
    model: Mapped[str]
    number: Mapped[int | None]
    format: Mapped[str | None]
    route: Mapped[str]
    key_id: Mapped[str | None]
    status: Mapped[int]
    reason: Mapped[str | None]
    finish_reason: Mapped[str | None]
    seconds: Mapped[float]
    first_token_seconds: Mapped[float | None]
    tokens_in: Mapped[int | None]
    tokens_out: Mapped[int | None]
    prompt: Mapped[str | None]
    answer: Mapped[str | None]
    bytes: Mapped[int]
    temperature: Mapped[float | None]
    max_tokens: Mapped[int | None]
    logprob: Mapped[float | None]
    client_request_id: Mapped[str | None]
    outcome: Mapped[str]
    user_hash: Mapped[str | None]
    unit: Mapped[str | None]
    valid: Mapped[bool | None]


class FeedbackRow(Table):
    """A user's feedback on an answer, deleted together with its request."""

    __tablename__ = "feedback"

    request: Mapped[int] = mapped_column(sa.ForeignKey("requests.id", ondelete="CASCADE"), primary_key=True)
    given_at: Mapped[datetime]
    rating: Mapped[str]
    label: Mapped[str | None]
    correction: Mapped[str | None]


class HoldoutRunRow(TargetRow, Table):
    """One evaluation of a served version on its held-out examples. `results` is JSON that contains no texts."""

    __tablename__ = "holdout_runs"

    id: Mapped[int] = mapped_column(primary_key=True, sort_order=-2)
    engine: Mapped[str]
    cause: Mapped[str]
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime]
    outcome: Mapped[str]
    reason: Mapped[str | None]
    results: Mapped[str]


class DriftStateRow(TargetKeyRow, Table):
    """Drift detection state for one signal of a version's traffic. `state` and `report` are JSON defined by
    monitoring.
    """

    __tablename__ = "drift_states"

    signal: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    report: Mapped[str]
    checked_at: Mapped[datetime]


class DriftAlarmRow(TargetRow, Table):
    """One drift alarm, which is active until its end is set. `examples` contains request ids, one per line."""

    __tablename__ = "drift_alarms"

    id: Mapped[int] = mapped_column(primary_key=True, sort_order=-2)
    signal: Mapped[str]
    feature: Mapped[str]
    since: Mapped[datetime]
    called_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    moved: Mapped[str]
    examples: Mapped[str]


class DriftItemRow(TargetRow, Table):
    """Drift features of one request, without its text. The row is deleted together with its request.

    `features` is JSON. `topic` and `wanted` are float32 arrays and `words` is an int32 array, all little-endian.
    """

    __tablename__ = "drift_items"
    # Ids are never reused: a reader's cursor stays valid after all rows were deleted.
    __table_args__ = (sa.Index("ix_drift_items_target", "name", "number", "format"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(primary_key=True, sort_order=-2)
    request: Mapped[int] = mapped_column(
        sa.ForeignKey("requests.id", ondelete="CASCADE"), unique=True, index=True, sort_order=-2
    )
    features: Mapped[str]
    topic: Mapped[bytes]
    wanted: Mapped[bytes]
    words: Mapped[bytes]
    conversation: Mapped[int] = mapped_column(sa.BigInteger)


class DriftBaselineRow(TargetKeyRow, Table):
    """A version's traffic that was accepted as its drift reference. Later traffic is compared with it instead
    of with the version's own examples.
    """

    __tablename__ = "drift_baselines"

    data: Mapped[bytes]


class KeyRow(Table):
    """An API key, possibly revoked. `revision` increases with every change to any key. Lists are stored
    space-separated.
    """

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[int] = mapped_column(index=True)
    name: Mapped[str]
    hash: Mapped[str]
    scopes: Mapped[str]
    models: Mapped[str | None]
    requests_per_minute: Mapped[int | None]
    tokens_in_per_minute: Mapped[int | None]
    tokens_out_per_minute: Mapped[int | None]
    concurrent: Mapped[int | None]
    tokens_per_day: Mapped[int | None] = mapped_column(sa.BigInteger)
    weight: Mapped[int]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    previous_hash: Mapped[str | None]
    previous_until: Mapped[datetime | None]


class AuditRow(Table):
    """An audit event, which is never changed or deleted. `at` is stored as text because the hash covers its
    exact characters.
    """

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    actor: Mapped[str]
    origin: Mapped[str]
    reason: Mapped[str | None]
    details: Mapped[str]
    previous_hash: Mapped[str]
    hash: Mapped[str]


@sa.event.listens_for(AuditRow.__table__, "after_create")
def _refuse_audit_changes(target: object, connection: sa.Connection, **options: object) -> None:
    if connection.dialect.name == "sqlite":
        for change in ("UPDATE", "DELETE"):
            connection.exec_driver_sql(
                f"CREATE TRIGGER audit_no_{change} BEFORE {change} ON audit\n"
                "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
            )
        return
    connection.exec_driver_sql(
        "CREATE FUNCTION refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS\n"
        "$$ BEGIN RAISE integrity_constraint_violation USING MESSAGE = 'the audit log is append-only'; END $$"
    )
    for change, level in (("UPDATE", "ROW"), ("DELETE", "ROW"), ("TRUNCATE", "STATEMENT")):
        connection.exec_driver_sql(
            f"CREATE TRIGGER audit_no_{change} BEFORE {change} ON audit\n"
            f"FOR EACH {level} EXECUTE FUNCTION refuse_audit_change()"
        )


class UsageRow(Table):
    """One key's usage of one model in one hour. `key_id` is empty for requests without a key."""

    __tablename__ = "usage"

    hour: Mapped[datetime] = mapped_column(primary_key=True)
    key_id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    requests: Mapped[int] = mapped_column(sa.BigInteger)
    tokens_in: Mapped[int] = mapped_column(sa.BigInteger)
    tokens_out: Mapped[int] = mapped_column(sa.BigInteger)


class ServedRow(TargetRow, Table):
    """A period in which a version of a model was served. If it has no end, the version is still being served,
    or the server died.
    """

    __tablename__ = "served"

    id: Mapped[int] = mapped_column(primary_key=True, sort_order=-2)
    server: Mapped[str] = mapped_column(default="", server_default="", sort_order=-2)
    name: Mapped[str] = mapped_column(index=True, sort_order=-2)
    generation: Mapped[int]
    began_at: Mapped[datetime]
    began_by: Mapped[str]
    ended_at: Mapped[datetime | None]
    ended_by: Mapped[str | None]


class FileRow(Table):
    """A file that a client uploaded, or that the server wrote for a client. Its contents are stored outside the
    database.

    `owner` is the id of the key that owns the file; empty for requests without a key.
    """

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    purpose: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(sa.BigInteger)
    sha256: Mapped[str]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    status: Mapped[str]
    status_details: Mapped[str | None]


class UploadRow(Table):
    """A file that a client uploads in parts. The parts are stored outside the database."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    purpose: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(sa.BigInteger)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    expires_after_s: Mapped[int | None]
    status: Mapped[str]
    file: Mapped[str | None]


class UploadPartRow(Table):
    """One part of an upload."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(primary_key=True)
    upload: Mapped[str] = mapped_column(sa.ForeignKey("uploads.id", ondelete="CASCADE"), index=True)
    bytes: Mapped[int] = mapped_column(sa.BigInteger)
    created_at: Mapped[datetime]


class JobRow(Table):
    """A fine-tuning job. `request` and `error` are JSON, `recipe` is YAML.

    `worker` runs the job, and last reported at `seen_at`. `wanted` is the owner's latest request: to run, pause or
    cancel the job.
    """

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    fingerprint: Mapped[str] = mapped_column(index=True)
    model: Mapped[str]
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    request: Mapped[str]
    recipe: Mapped[str]
    name: Mapped[str]
    status: Mapped[str] = mapped_column(index=True)
    wanted: Mapped[str]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    estimated_finish: Mapped[datetime | None]
    worker: Mapped[str | None]
    seen_at: Mapped[datetime | None]
    attempts: Mapped[int]
    trained_tokens: Mapped[int | None] = mapped_column(sa.BigInteger)
    number: Mapped[int | None]
    fine_tuned_model: Mapped[str | None] = mapped_column(index=True)
    result_file: Mapped[str | None]
    error: Mapped[str | None]


class JobEventRow(Table):
    """An event of a fine-tuning job. `data` is JSON."""

    __tablename__ = "job_events"

    id: Mapped[int] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(sa.ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    at: Mapped[datetime]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[str | None]


class JobCheckpointRow(Table):
    """A fine-tuning job's checkpoint, which clients can chat with. `metrics` is JSON."""

    __tablename__ = "job_checkpoints"

    id: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(sa.ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime]
    step: Mapped[int]
    model: Mapped[str] = mapped_column(index=True)
    metrics: Mapped[str]


class BatchRow(Table):
    """A batch of requests that are answered at lower priority than live traffic.

    `errors` and `labels` (the request's metadata) are JSON. Result files expire `output_expires_s` seconds after their
    creation.
    """

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    input_file: Mapped[str]
    endpoint: Mapped[str]
    completion_window: Mapped[str]
    model: Mapped[str | None]
    status: Mapped[str] = mapped_column(index=True)
    labels: Mapped[str | None]
    output_expires_s: Mapped[int | None]
    errors: Mapped[str | None]
    total: Mapped[int]
    completed: Mapped[int]
    failed: Mapped[int]
    tokens_in: Mapped[int] = mapped_column(sa.BigInteger)
    tokens_out: Mapped[int] = mapped_column(sa.BigInteger)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    in_progress_at: Mapped[datetime | None]
    finalizing_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    failed_at: Mapped[datetime | None]
    expired_at: Mapped[datetime | None]
    cancelling_at: Mapped[datetime | None]
    cancelled_at: Mapped[datetime | None]
    output_file: Mapped[str | None]
    error_file: Mapped[str | None]


def target_columns(target: Target) -> dict[str, Any]:
    """Return the `TargetRow` columns that identify a version and its format."""
    return {"name": target.version.name, "number": target.version.number, "format": target.format}


def target_of(row: TargetRow) -> Target:
    """Return the version and format to which a row belongs."""
    return Target(VersionId(row.name, row.number), Format(row.format))


def is_of(table: type[TargetRow], target: Target) -> sa.ColumnElement[bool]:
    """Return an SQL condition that selects the rows of a version in a given format."""
    return sa.and_(*(getattr(table, name) == value for name, value in target_columns(target).items()))
