"""Tests that a file is either the old or the new one, and that libraries' disk-full errors are recognized."""

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from svc.files.disk import close_to_others, is_full, sync_files, write_whole


@pytest.mark.parametrize(
    ("mode", "names", "closed"),
    [
        (0o755, [], True),
        (0o755, ["mine", "notes.txt"], True),
        (0o755, ["notes.txt"], False),
        (0o1777, ["mine"], False),
        (0o777, [], False),
    ],
)
def test_owner_only_permissions_are_set_only_on_unshared_tuneserve_folders(
    tmp_path: Path, mode: int, names: list[str], closed: bool
) -> None:
    """A user may set /tmp as a home, for example."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    folder.chmod(mode)
    close_to_others(folder, ["mine"])
    assert (folder.stat().st_mode & 0o7777 == 0o700) is closed


def test_existing_file_is_replaced_on_write(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for content in (b"old", b"new"):
        write_whole(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_existing_file_is_unchanged_when_a_write_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_whole(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"


def test_files_in_a_folder_and_the_folder_itself_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    sync_files(tmp_path)
    assert sorted(synced) == sorted(map(str, [tmp_path, tmp_path / "a", tmp_path / "b"]))


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (ValueError("something else"), False),
    ],
)
def test_full_disk_error_is_recognized(tmp_path: Path, error: Exception, full: bool) -> None:
    assert is_full(error, tmp_path) is full


@pytest.mark.parametrize(("free", "full"), [(4096, True), (10**9, False)])
def test_truncated_torch_write_counts_as_a_full_disk_error_if_no_space_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, full: bool
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - free, free))
    assert is_full(RuntimeError("[enforce fail] . unexpected pos 126400 vs 126288"), tmp_path) is full
