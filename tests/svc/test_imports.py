"""Tests that imports run without the garbage collector."""

import gc
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from svc.imports import without_garbage_collection


def test_garbage_collector_is_off_only_while_importing() -> None:
    with without_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_garbage_collector_is_on_again_after_a_failed_import() -> None:
    with pytest.raises(ImportError), without_garbage_collection():
        raise ImportError
    assert gc.isenabled()


def test_garbage_collector_stays_off_until_the_outer_block_ends() -> None:
    with without_garbage_collection():
        with without_garbage_collection():
            pass
        assert not gc.isenabled()


def test_imported_objects_are_not_searched_for_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_this_test.py").write_text("content = [[]]", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with without_garbage_collection():
        imported = importlib.import_module("of_this_test")
    assert not any(each is imported.content for each in gc.get_objects())


def test_objects_stay_collectable_if_everything_was_imported_before() -> None:
    model: list[object] = [[]]
    with without_garbage_collection():
        importlib.import_module("pytest")
    assert any(each is model for each in gc.get_objects())


@pytest.mark.slow
def test_garbage_collector_does_not_run_while_torch_and_transformers_are_imported() -> None:
    """Libraries may turn the collector on or run it while they are imported; a new process imports them afresh."""
    code = (
        "import gc; from svc.imports import without_garbage_collection as off; phases = []\n"
        "gc.callbacks.append(lambda phase, _: phases.append(phase))\n"
        "with off(): import torch; from transformers import AutoTokenizer; phases_during = list(phases)\n"
        "print(len(phases_during), gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["0", "True", "True"]
