"""Checkpoints are whole or not there."""

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from svc.errors import DiskSpaceError
from trainer.checkpoints import CheckpointFolder


def write(folder: CheckpointFolder, step: int, best: int | None = None) -> None:
    with folder.writing(step, best) as path:
        (path / "weights.safetensors").write_bytes(b"weights %d" % step)


def steps(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.folder.iterdir())


def test_the_newest_is_found(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=3)
    assert folder.newest() is None
    for step in (9, 10, 100):
        write(folder, step)
    assert folder.newest() == folder.at(100)


def test_old_ones_go_and_the_best_stays(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in range(1, 6):
        write(folder, step, best=2 if step >= 2 else None)
    assert steps(folder) == [folder.at(step).name for step in (2, 4, 5)]


@pytest.mark.parametrize("damage", ["shorter", "changed", "missing", "unrecorded"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: str) -> None:
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


def test_one_that_is_not_finished_is_none(tmp_path: Path) -> None:
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
def test_a_full_disk_leaves_the_one_before_and_says_so(tmp_path: Path, error: Exception) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    write(folder, 1)
    with pytest.raises(DiskSpaceError, match="no room for the checkpoint of step 2") as caught, folder.writing(2):
        raise error
    assert "goes on from step-00000001" in caught.value.todo
    assert steps(folder) == [folder.at(1).name]


def test_a_write_that_torch_found_cut_off_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 4096))
    with (
        pytest.raises(DiskSpaceError, match="no room for the checkpoint"),
        CheckpointFolder(tmp_path, keep=1).writing(1),
    ):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 126400 vs 126288")


def test_the_same_error_with_room_on_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="unexpected pos"), CheckpointFolder(tmp_path, keep=1).writing(1):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 126400 vs 126288")


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="something else"), CheckpointFolder(tmp_path, keep=1).writing(1):
        raise ValueError("something else")
