"""Tests that checkpoints are either complete or absent."""

import errno
import os
from pathlib import Path

import pytest

from svc.errors import DiskSpaceError, IntegrityError
from trainer.training.checkpoints import CheckpointFolder


def write(folder: CheckpointFolder, step: int, best: int | None = None) -> None:
    with folder.writing(step, best) as path:
        (path / "weights.safetensors").write_bytes(b"weights %d" % step)


def steps(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.folder.iterdir())


def test_newest_checkpoint_is_returned(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=3)
    assert folder.newest() is None
    for step in (9, 10, 100):
        write(folder, step)
    assert folder.newest() == folder.at(100)


def test_old_checkpoints_except_the_best_are_deleted(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in range(1, 6):
        write(folder, step, best=2 if step >= 2 else None)
    assert steps(folder) == [folder.at(step).name for step in (2, 4, 5)]


@pytest.mark.parametrize("damage", ["shorter", "changed", "missing", "unrecorded"])
def test_corrupt_checkpoint_is_skipped(tmp_path: Path, damage: str) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    write(folder, 1)
    write(folder, 2)
    weights = folder.at(2) / "weights.safetensors"
    match damage:
        case "shorter":
            weights.write_bytes(b"weigh")
        case "changed":
            weights.write_bytes(b"weightz 2")
        case "missing":
            weights.unlink()
        case "unrecorded":
            (folder.at(2) / "files.json").unlink()
    assert folder.newest() == folder.at(1)


@pytest.mark.parametrize("keep", [1, 2])
def test_corrupt_checkpoints_of_later_steps_are_deleted_when_a_new_checkpoint_is_written(
    tmp_path: Path, keep: int
) -> None:
    folder = CheckpointFolder(tmp_path, keep)
    for step in (10, 20, 30):
        write(folder, step, best=10)
    for damaged in folder.folder.glob("step-*[23]0"):
        (damaged / "weights.safetensors").write_bytes(b"")
    assert folder.newest() == folder.at(10)
    write(folder, 12, best=10)
    assert folder.newest() == folder.at(12)
    assert {path.name for path in folder.folder.iterdir()} <= {folder.at(step).name for step in (10, 12)}


def test_requesting_a_corrupt_or_missing_checkpoint_raises_error(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    write(folder, 1)
    assert folder.whole(1) == folder.at(1)
    (folder.at(1) / "weights.safetensors").write_bytes(b"")
    for step in (1, 2):
        with pytest.raises(IntegrityError, match="missing or damaged"):
            folder.whole(step)


def test_unfinished_checkpoint_is_ignored(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    write(folder, 1)
    with pytest.raises(KeyboardInterrupt), folder.writing(2):
        raise KeyboardInterrupt
    assert folder.newest() == folder.at(1)
    write(folder, 3)
    assert steps(folder) == [folder.at(1).name, folder.at(3).name]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("PytorchStreamWriter failed writing file data/0: No space left on device"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "torch", "safetensors"],
)
def test_previous_checkpoint_is_kept_when_the_disk_is_full(tmp_path: Path, error: Exception) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    write(folder, 1)
    with (
        pytest.raises(DiskSpaceError, match="for the checkpoint at step 2") as caught,
        folder.writing(2),
    ):
        raise error
    assert "resumes from step-00000001" in caught.value.todo
    assert steps(folder) == [folder.at(1).name]


def test_errors_other_than_a_full_disk_propagate_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="something else"), CheckpointFolder(tmp_path, keep=1).writing(1):
        raise ValueError("something else")
