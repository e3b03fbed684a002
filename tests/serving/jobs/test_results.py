"""Tests the results of fine-tuning jobs."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine as Store

from serving.jobs.results import PROGRESS_FILE, JobResults, metrics_csv
from svc.client_files.client_files import ClientFiles
from svc.store.files import FileStatus, Purpose, find_file, read_files
from svc.store.jobs import Job, JobStatus
from svc.store.page import Page
from svc.training_progress import HeldoutLoss, ProgressFile, ProgressRecord, StepDone
from svc.version import VersionId

VERSION = VersionId("ft-alice-tickets", 2)
JOB = Job(
    id="ftjob-0123456789abcdef01234567",
    owner="alice",
    fingerprint="1",
    model="small",
    training_file="file-1",
    request=json.dumps({"model": "small", "training_file": "file-1", "suffix": "tickets"}),
    recipe="",
    name=VERSION.name,
    created_at=datetime.now(UTC),
    status=JobStatus.RUNNING,
)
STEPS: list[ProgressRecord] = [
    StepDone(step=1, steps=2, epoch=0.5, loss=1.5, accuracy=0.25, tokens=10),
    StepDone(step=2, steps=2, epoch=1.0, loss=0.123456789, tokens=20),
    HeldoutLoss(step=2, loss=0.5, accuracy=1.0),
]


def step(number: int, loss: float) -> StepDone:
    return StepDone(step=number, steps=9, epoch=1.0, loss=loss, tokens=1)


@pytest.fixture
def files(store: Store, tmp_path: Path) -> ClientFiles:
    return ClientFiles(store, tmp_path / "files")


@pytest.fixture
def results(store: Store, files: ClientFiles, tmp_path: Path) -> JobResults:
    folder = tmp_path / "jobs" / JOB.id
    folder.mkdir(parents=True)
    for record in STEPS:
        ProgressFile(folder / PROGRESS_FILE).write(record)
    return JobResults(store, files, tmp_path / "jobs", "org")


def own_files(store: Store) -> list[Any]:
    return read_files(store, "alice", page=Page(10))[0]


def test_result_file_has_openais_columns_and_belongs_to_the_owner_of_the_job(
    store: Store, files: ClientFiles, results: JobResults
) -> None:
    result = results.complete(JOB, VERSION)
    assert result.fine_tuned_model == "ft:small:org:tickets:0123456789ab"
    assert result.result_file is not None
    file = find_file(store, result.result_file, "alice")
    content = files.path(file.id).read_text()
    assert (file.purpose, file.status) == (Purpose.FINE_TUNE_RESULTS, FileStatus.PROCESSED)
    assert (file.filename, file.bytes) == ("step_metrics.csv", len(content))
    assert content.splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "1,1.50000,0.25000,,",
        "2,0.12346,,0.50000,1.00000",
    ]


def test_same_result_and_one_file_when_completed_again_after_a_crash(
    store: Store, files: ClientFiles, results: JobResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "add", fail)
        with pytest.raises(KeyboardInterrupt):
            results.complete(JOB, VERSION)
    assert own_files(store) == []
    first = results.complete(JOB, VERSION)
    assert results.complete(JOB, VERSION) == first
    assert [file.id for file in own_files(store)] == [first.result_file]


def test_file_that_was_written_in_part_is_replaced(store: Store, files: ClientFiles, results: JobResults) -> None:
    first = results.complete(JOB, VERSION)
    assert first.result_file is not None
    files.delete(first.result_file)
    files.path(first.result_file).write_text("step,tr")  # the server was killed before it added the row
    results.complete(JOB, VERSION)
    assert files.path(first.result_file).read_text().count("\n") == 3


def test_jobs_have_different_files_and_names(results: JobResults) -> None:
    other = replace(JOB, id="ftjob-76543210fedcba9876543210")
    first, second = results.complete(JOB, VERSION), results.complete(other, VERSION)
    assert first.result_file != second.result_file
    assert first.fine_tuned_model != second.fine_tuned_model


def test_result_file_has_only_the_columns_when_no_step_was_reported(files: ClientFiles, results: JobResults) -> None:
    result = results.complete(replace(JOB, id="ftjob-76543210fedcba9876543210"), VERSION)
    assert result.result_file is not None
    assert files.path(result.result_file).read_text().count("\n") == 1


def test_last_record_of_a_step_counts_when_a_resumed_training_repeats_it() -> None:
    text = metrics_csv([step(1, 3.0), step(2, 2.0), step(1, 1.0), HeldoutLoss(step=3, loss=0.5)])
    assert text.splitlines()[1:] == ["1,1.00000,,,", "2,2.00000,,,", "3,,,0.50000,"]
