"""Tests the results of fine-tuning jobs."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from sqlalchemy import Engine as Store

from serving.files.client_files import ClientFiles
from serving.files.rows import FileStatus, Purpose, find_file, read_files
from serving.fine_tuning.results import PROGRESS_FILE, JobResults, metrics_csv
from serving.fine_tuning.rows import Job, JobCheckpoint, read_checkpoints
from serving.http.page import Page
from serving.models.checkpoint_versions import checkpoint_version
from serving.models.fine_tuned_rows import find_model, owners_of
from svc.registry.adapter import CONFIG_FILE, read_adapter
from svc.registry.registry import Registry
from svc.store.statuses import JobStatus
from svc.training_progress import EpochSaved, HeldoutLoss, ProgressFile, ProgressRecord, StepDone
from svc.version import Format, VersionId
from tests.serving.trained import add_job
from tests.serving.versions import AliasBook, make_version

VERSION = VersionId("ft-alice-tickets", 2)
NAME = "ft:small:org:tickets:0123456789ab"
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
def registry(tmp_path: Path) -> Registry:
    """Return a registry with the job's version."""
    registry = Registry(tmp_path / "models", AliasBook())
    make_version(registry, VERSION.number, name=VERSION.name, formats=(Format.MERGED, Format.ADAPTER))
    return registry


@pytest.fixture
def progress(tmp_path: Path) -> ProgressFile:
    """Return the file with the job's progress."""
    folder = tmp_path / "jobs" / JOB.id
    folder.mkdir(parents=True)
    file = ProgressFile(folder / PROGRESS_FILE)
    for record in STEPS:
        file.write(record)
    return file


@pytest.fixture
def results(store: Store, files: ClientFiles, registry: Registry, tmp_path: Path, progress: ProgressFile) -> JobResults:
    return JobResults(store, files, registry, tmp_path / "jobs", "org")


def save_epoch(registry: Registry, progress: ProgressFile, step: int, *, same: bool = False, **config: Any) -> Path:
    """Save the adapter of an epoch as the trainer does, with the weights of the job's version or others."""
    folder = registry.models.parent / "epochs" / str(step)
    shutil.copytree(registry.folder(VERSION) / "adapter", folder)
    if not same:
        save_file({"weight": np.full((1,), step, dtype=np.float32)}, folder / "adapter_model.safetensors")
    written = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(written | config))
    progress.write(EpochSaved(step=step, folder=str(folder)))
    return folder


def checkpoints(store: Store) -> list[JobCheckpoint]:
    return read_checkpoints(store, JOB.id, page=Page(10, newest_first=False))[0]


def own_files(store: Store) -> list[Any]:
    return read_files(store, "alice", page=Page(10))[0]


def test_result_file_has_the_openai_columns_and_belongs_to_the_job_owner(
    store: Store, files: ClientFiles, results: JobResults
) -> None:
    result = results.complete(JOB, VERSION)
    assert result.fine_tuned_model == NAME
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


def test_completing_a_job_again_after_a_crash_creates_no_duplicate_result_file(
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


def test_partially_written_result_file_is_replaced(store: Store, files: ClientFiles, results: JobResults) -> None:
    first = results.complete(JOB, VERSION)
    assert first.result_file is not None
    files.delete(first.result_file)
    files.path(first.result_file).write_text("step,tr")  # the server was killed before it added the row
    results.complete(JOB, VERSION)
    assert files.path(first.result_file).read_text().count("\n") == 3


def test_last_three_epochs_become_checkpoints_and_the_last_becomes_the_fine_tuned_model(
    store: Store, registry: Registry, progress: ProgressFile, results: JobResults
) -> None:
    add_job(store, owner="alice", id=JOB.id, name=VERSION.name, fine_tuned_model=NAME)
    for step in (1, 2, 3, 4):
        save_epoch(registry, progress, step, same=step == 4)
    for _ in range(2):  # again after a crash
        results.complete(JOB, VERSION)
    found = checkpoints(store)
    assert [(each.step, each.model) for each in found] == [
        (2, f"{NAME}:ckpt-step-2"),
        (3, f"{NAME}:ckpt-step-3"),
        (4, NAME),
    ]
    versions = [find_model(store, each.model) for each in found]
    ids = [str(each.version) for each in versions if each]
    assert ids == ["ft-ckpt-0123456789abcdef01234567@2", "ft-ckpt-0123456789abcdef01234567@3", f"{VERSION.name}@1"]
    assert json.loads(found[0].metrics) == {
        "step": 2,
        "train_loss": 0.123456789,
        "train_mean_token_accuracy": None,
        "valid_loss": 0.5,
        "valid_mean_token_accuracy": 1.0,
        "full_valid_loss": 0.5,
        "full_valid_mean_token_accuracy": 1.0,
    }
    assert registry.versions(VERSION.name) == [VERSION]


def test_checkpoint_is_registered_as_a_version_that_engines_load_as_an_adapter(
    store: Store, registry: Registry, progress: ProgressFile, results: JobResults
) -> None:
    add_job(store, owner="alice", id=JOB.id)
    save_epoch(registry, progress, 2)
    results.complete(JOB, VERSION)
    version = checkpoint_version(JOB.id, 2)
    registry.verify(version, Format.ADAPTER)
    assert read_adapter(registry, version).base == read_adapter(registry, VERSION).base
    assert registry.heldout(version) == registry.heldout(VERSION)
    assert owners_of(store, version.name) == {"alice"}


@pytest.mark.parametrize("config", [{"peft_type": "ADALORA"}, {"use_dora": True}])
def test_adapter_that_engines_cannot_apply_does_not_become_a_checkpoint(
    store: Store, registry: Registry, progress: ProgressFile, results: JobResults, config: dict[str, Any]
) -> None:
    save_epoch(registry, progress, 2, **config)
    results.complete(JOB, VERSION)
    assert checkpoints(store) == []


def test_job_succeeds_without_checkpoints_if_the_folder_of_its_saved_epoch_was_deleted(
    store: Store, registry: Registry, progress: ProgressFile, results: JobResults
) -> None:
    shutil.rmtree(save_epoch(registry, progress, 2))
    assert results.complete(JOB, VERSION).result_file
    assert checkpoints(store) == []


def test_registered_checkpoints_remain_when_their_training_folders_are_deleted(
    store: Store, registry: Registry, progress: ProgressFile, results: JobResults
) -> None:
    add_job(store, owner="alice", id=JOB.id, name=VERSION.name, fine_tuned_model=NAME)
    folders = [save_epoch(registry, progress, step) for step in (1, 2)]
    first = results.complete(JOB, VERSION)
    before = checkpoints(store)
    for folder in folders:
        shutil.rmtree(folder)
    assert results.complete(JOB, VERSION) == first
    assert checkpoints(store) == before
    assert len(before) == 2
    for step in (1, 2):
        registry.verify(checkpoint_version(JOB.id, step), Format.ADAPTER)


def test_two_jobs_have_different_result_files_and_different_model_names(results: JobResults) -> None:
    other = replace(JOB, id="ftjob-76543210fedcba9876543210")
    first, second = results.complete(JOB, VERSION), results.complete(other, VERSION)
    assert first.result_file != second.result_file
    assert first.fine_tuned_model != second.fine_tuned_model


def test_result_file_has_only_a_header_row_when_no_step_was_reported(files: ClientFiles, results: JobResults) -> None:
    result = results.complete(replace(JOB, id="ftjob-76543210fedcba9876543210"), VERSION)
    assert result.result_file is not None
    assert files.path(result.result_file).read_text().count("\n") == 1


def test_result_file_uses_the_last_record_of_a_step_that_a_resumed_run_repeats() -> None:
    text = metrics_csv([step(1, 3.0), step(2, 2.0), step(1, 1.0), HeldoutLoss(step=3, loss=0.5)])
    assert text.splitlines()[1:] == ["1,1.00000,,,", "2,2.00000,,,", "3,,,0.50000,"]
