"""Tests that the engine's socket is in a folder that no other user can enter."""

import os
import tempfile
from pathlib import Path

import pytest

from svc.engine.vllm.folders import runtime_folder
from svc.engine.vllm.launch import SOCKET_FILE
from svc.errors import EngineError


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which runtime folders are created."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_runtime_folder_has_owner_only_permissions(parent: Path, tmp_path: Path) -> None:
    folder = runtime_folder(tmp_path, "serve")
    assert folder.parent == parent
    assert folder.stat().st_mode & 0o777 == 0o700


def test_equivalent_paths_of_a_tuneserve_home_yield_the_same_runtime_folder(parent: Path, tmp_path: Path) -> None:
    assert runtime_folder(tmp_path, "serve") == runtime_folder(tmp_path / "x" / "..", "serve")


def test_each_combination_of_tuneserve_home_and_purpose_has_its_own_runtime_folder(
    parent: Path, tmp_path: Path
) -> None:
    folders = {runtime_folder(home, purpose) for home in (tmp_path, tmp_path / "b") for purpose in ("serve", "run-1")}
    assert len(folders) == 4


def test_socket_path_is_short_even_if_the_path_of_the_tuneserve_home_is_long() -> None:
    folder = runtime_folder(Path("/" + "deep/" * 60), "a-run-with-a-long-name" * 5)
    folder.rmdir()
    assert len(str(folder / SOCKET_FILE)) < 108


def test_runtime_folder_accessible_to_other_users_is_rejected(parent: Path, tmp_path: Path) -> None:
    runtime_folder(tmp_path, "serve").chmod(0o755)
    with pytest.raises(EngineError, match="not owned by this user or is accessible"):
        runtime_folder(tmp_path, "serve")


def test_symbolic_link_in_place_of_the_runtime_folder_is_rejected(parent: Path, tmp_path: Path) -> None:
    folder = runtime_folder(tmp_path, "serve")
    folder.rmdir()
    (tmp_path / "other").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "other")
    with pytest.raises(EngineError, match="not owned by this user or is accessible"):
        runtime_folder(tmp_path, "serve")


def test_file_in_place_of_the_runtime_folder_is_rejected(parent: Path, tmp_path: Path) -> None:
    folder = runtime_folder(tmp_path, "serve")
    folder.rmdir()
    folder.touch()
    with pytest.raises(EngineError, match="not owned by this user or is accessible"):
        runtime_folder(tmp_path, "serve")


def test_runtime_folder_owned_by_another_user_is_rejected(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.getuid()
    folder = runtime_folder(tmp_path, "serve")
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    folder.rename(folder.with_name(folder.name.replace(f"-{own}-", f"-{own + 1}-")))
    with pytest.raises(EngineError, match="not owned by this user or is accessible"):
        runtime_folder(tmp_path, "serve")


def test_missing_temporary_folder_raises_error_with_advice(parent: Path, tmp_path: Path) -> None:
    parent.rmdir()
    with pytest.raises(EngineError, match="cannot create") as caught:
        runtime_folder(tmp_path, "serve")
    assert "TMPDIR" in caught.value.todo
