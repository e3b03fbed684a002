"""Results of fine-tuning jobs: the model's client-facing name, the file with its training metrics, and the checkpoints
of its newest epochs.

Every function may be called again after a crash and then returns the same result.
"""

import csv
import hashlib
import io
import json
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Engine as Store

from serving.files.client_files import ClientFiles
from serving.files.rows import FileStatus, Purpose, find_file
from serving.fine_tuning.queue import JobResult
from serving.fine_tuning.recipe import MAX_CHECKPOINTS
from serving.fine_tuning.request import JobRequest
from serving.fine_tuning.rows import Job, JobCheckpoint, add_checkpoint
from serving.http.page import EntryNotFoundError
from serving.models.checkpoint_versions import checkpoint_version
from serving.models.fine_tuned_name import FineTunedName, make_fine_tuned_name
from svc.errors import SvcError
from svc.files.json_file import read_json_object
from svc.registry.adapter import CONFIG_FILE, adapter_refusal
from svc.registry.files import record_file, record_files
from svc.registry.manifest import FormatRecord, Manifest
from svc.registry.registry import HELDOUT_FILE, Registry
from svc.training_progress import EpochSaved, HeldoutLoss, ProgressReader, ProgressRecord, StepDone
from svc.version import Format, VersionId

log = logging.getLogger(__name__)

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
"""Columns of OpenAI's result files. A cell is empty if the value was not measured at the step."""
FILENAME = "step_metrics.csv"
"""Name that OpenAI gives to result files."""
PROGRESS_FILE = "progress"
"""Name of the file in a job's folder in which the training process records its progress."""


class JobResults:
    """Creates the results of jobs.

    Args:
        folder: folder that contains a folder for each job.
        organization: organization name that model names include.
    """

    def __init__(self, store: Store, files: ClientFiles, registry: Registry, folder: Path, organization: str) -> None:
        self._store = store
        self._registry = registry
        self._files = files
        self._folder = folder
        self._organization = organization

    def complete(self, job: Job, version: VersionId) -> JobResult:
        """Write a job's result file, register its checkpoints, and return its result.

        Args:
            version: the version that was registered for the job.

        Raises:
            OSError: the disk is full.
        """
        records = ProgressReader(self._folder / job.id / PROGRESS_FILE).read()
        id = _id("file-", job.id)
        try:
            find_file(self._store, id, job.owner)
        except EntryNotFoundError:
            self._write(id, job, records)
        saved = {record.step: Path(record.folder) for record in records if isinstance(record, EpochSaved)}
        for step in sorted(saved)[-MAX_CHECKPOINTS:]:
            try:
                self._add_checkpoint(job, version, step, saved[step], records)
            except SvcError:  # the model itself is complete
                log.exception("the checkpoint of %s at step %d could not be registered", job.id, step)
        return JobResult(str(self.model_name(job)), id)

    def model_name(self, job: Job) -> FineTunedName:
        """Return the client-facing name of the model that a job trains."""
        suffix = JobRequest.model_validate_json(job.request).suffix or ""
        return make_fine_tuned_name(model=job.model, organization=self._organization, suffix=suffix, job=job.id)

    def _write(self, id: str, job: Job, records: Iterable[ProgressRecord]) -> None:
        with self._files.writing(id) as (_, writer):
            writer.write(metrics_csv(records).encode())
            self._files.add(
                id,
                writer,
                owner=job.owner,
                purpose=Purpose.FINE_TUNE_RESULTS,
                filename=FILENAME,
                status=FileStatus.PROCESSED,
            )

    def _add_checkpoint(
        self, job: Job, version: VersionId, step: int, folder: Path, records: Iterable[ProgressRecord]
    ) -> None:
        """Register a checkpoint that engines can apply as an adapter, and add it to the job."""
        name, published = self.model_name(job), self._registry.manifest(version)
        if Format.ADAPTER not in published.formats or not (folder / CONFIG_FILE).is_file():
            return  # the run's folder was removed
        if adapter_refusal(read_json_object(folder / CONFIG_FILE)):
            return
        trained = self._registry.artifact(version, Format.ADAPTER)
        if _weights_digest(folder) != _weights_digest(trained):  # else it is the model itself
            self._registry.publish_as(
                checkpoint_version(job.id, step),
                {Format.ADAPTER.value: folder, HELDOUT_FILE: self._registry.folder(version) / HELDOUT_FILE},
                lambda id, root: _checkpoint_manifest(published, id, root),
            )
            name = name.at_step(step)
        id, metrics = _id("ftckpt_", f"{job.id}:{step}"), json.dumps(checkpoint_metrics(step, records))
        add_checkpoint(self._store, JobCheckpoint(id, job.id, datetime.now(UTC), step, str(name), metrics))


def checkpoint_metrics(step: int, records: Iterable[ProgressRecord]) -> dict[str, float | None]:
    """Return a step's metrics under OpenAI's names.

    OpenAI has separate metrics for a sample of the held-out examples and for all of them. Here, both have the same
    value, because the held-out loss is always measured on all held-out examples.
    """
    trained = heldout = None
    for record in records:
        if isinstance(record, StepDone) and record.step == step:
            trained = record
        elif isinstance(record, HeldoutLoss) and record.step == step:
            heldout = record
    loss, accuracy = (heldout.loss, heldout.accuracy) if heldout else (None, None)
    return {
        "step": step,
        "train_loss": trained.loss if trained else None,
        "train_mean_token_accuracy": trained.accuracy if trained else None,
        "valid_loss": loss,
        "valid_mean_token_accuracy": accuracy,
        "full_valid_loss": loss,
        "full_valid_mean_token_accuracy": accuracy,
    }


def metrics_csv(records: Iterable[ProgressRecord]) -> str:
    """Return the metrics of a training run as CSV, with one line per step. If a step has several records, the last
    record is used.
    """
    steps, heldout = dict[int, StepDone](), dict[int, HeldoutLoss]()
    for record in records:
        if isinstance(record, StepDone):
            steps[record.step] = record
        elif isinstance(record, HeldoutLoss):
            heldout[record.step] = record
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for step in sorted(steps.keys() | heldout.keys()):
        cells = (each for record in (steps.get(step), heldout.get(step)) for each in _cells(record))
        table.writerow([step, *cells])
    return text.getvalue()


def _cells(record: StepDone | HeldoutLoss | None) -> tuple[str, str]:
    if record is None:
        return "", ""
    return f"{record.loss:.5f}", "" if record.accuracy is None else f"{record.accuracy:.5f}"


def _checkpoint_manifest(published: Manifest, version: VersionId, root: Path) -> Manifest:
    """Return the manifest of a checkpoint: the manifest of the job's version, without its measurements."""
    adapter = FormatRecord(files=record_files(root, root / Format.ADAPTER))
    return published.model_copy(
        update={
            "name": version.name,
            "number": version.number,
            "created_at": datetime.now(UTC),
            "formats": {Format.ADAPTER: adapter},
            "reference": (),
            "failed": (),
            "parity": None,
            "judge": None,
            "forgetting": {},
            "gates": (),
        }
    )


def _weights_digest(folder: Path) -> str:
    return record_file(folder, folder / "adapter_model.safetensors").sha256


def _id(prefix: str, text: str) -> str:
    """Return an id derived from the text, so that the id is the same when it is computed again after a crash."""
    return prefix + hashlib.sha256(text.encode()).hexdigest()[:24]
