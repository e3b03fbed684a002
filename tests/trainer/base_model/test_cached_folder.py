"""Tests that folders built by several processes are either complete or missing."""

import threading
from pathlib import Path

import pytest

from trainer.base_model.cached_folder import build_once


def test_interrupted_build_of_a_cached_folder_leaves_no_files(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "cache" / "model", build)
    assert list((tmp_path / "cache").iterdir()) == []


def test_concurrent_builds_of_a_cached_folder_produce_one_complete_folder(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def build(folder: Path) -> None:
        (folder / "weights").write_text("whole", "utf-8")
        both.wait(timeout=5)

    target = tmp_path / "model"
    threads = [threading.Thread(target=build_once, args=(target, build)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "weights"]
