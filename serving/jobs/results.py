"""Results of fine-tuning jobs: the model's name for clients, and the file with the metrics of its training.

Every function may be called again after a crash, and then gives the same result.
"""

import csv
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import Engine as Store

from serving.jobs.request import JobRequest
from svc.client_files.client_files import ClientFiles
from svc.fine_tuned_name import FineTunedName, make_fine_tuned_name
from svc.store.files import FileStatus, Purpose, find_file
from svc.store.job_queue import JobResult
from svc.store.jobs import Job
from svc.store.page import EntryNotFoundError
from svc.training_progress import HeldoutLoss, ProgressReader, ProgressRecord, StepDone
from svc.version import VersionId

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
"""Columns of OpenAI's result files. A cell is empty if the value was not measured at the step."""
FILENAME = "step_metrics.csv"
"""Name of OpenAI's result files."""
PROGRESS_FILE = "progress"
"""Name of the file in a job's folder to which its training writes its progress."""


class JobResults:
    """Makes the results of jobs.

    Args:
        folder: folder that contains a folder for each job.
        organization: organization in the names of models.
    """

    def __init__(self, store: Store, files: ClientFiles, folder: Path, organization: str) -> None:
        self._store = store
        self._files = files
        self._folder = folder
        self._organization = organization

    def complete(self, job: Job, version: VersionId) -> JobResult:
        """Write a job's result file, and return its result.

        Args:
            version: the version that the job has registered.

        Raises:
            OSError: the file cannot be written.
        """
        id = _file_id(job)
        try:
            find_file(self._store, id, job.owner)
        except EntryNotFoundError:
            self._write(id, job)
        return JobResult(str(self.model_name(job)), id)

    def model_name(self, job: Job) -> FineTunedName:
        """Return the name for clients of the model that a job trains."""
        suffix = JobRequest.model_validate_json(job.request).suffix or ""
        return make_fine_tuned_name(model=job.model, organization=self._organization, suffix=suffix, job=job.id)

    def _write(self, id: str, job: Job) -> None:
        records = ProgressReader(self._folder / job.id / PROGRESS_FILE).read()
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


def metrics_csv(records: Iterable[ProgressRecord]) -> str:
    """Return the metrics of a training as CSV, with a line for each step. The last record of a step counts."""
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


def _file_id(job: Job) -> str:
    """Return the id of a job's result file, which is the same after a crash."""
    return f"file-{hashlib.sha256(job.id.encode()).hexdigest()[:24]}"
