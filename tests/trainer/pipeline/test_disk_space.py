"""Tests that runs on a full disk stop with an error before work is lost."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from svc.errors import DiskSpaceError
from tests.trainer.pipeline.stand_ins import Make, Stages
from trainer.export.verify_merge import MergeSummary
from trainer.pipeline import model_stages as stages_module
from trainer.pipeline.stages import Pipeline
from trainer.recipe.stage import Stage


def free_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free))


def test_run_fails_before_writing_files_when_the_disk_is_full(
    pipeline: Pipeline, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes(monkeypatch, 1000)
    with pytest.raises(DiskSpaceError, match="stage train needs"):
        pipeline.train_version()
    assert stages.ran == []
    assert [path.name for path in pipeline.run.folder.iterdir()] == ["lock"]


@pytest.mark.slow
def test_run_stops_before_the_next_stage_and_keeps_finished_stages_when_the_disk_fills_up(
    make: Make, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = stages.merge_adapter

    def merge_and_fill(base: Path, adapter: Path, out: Path, **options: bool) -> MergeSummary:
        summary = merge(base, adapter, out, **options)
        free_bytes(monkeypatch, 1000)
        return summary

    monkeypatch.setattr(stages_module, "merge_adapter", merge_and_fill)
    pipeline = make()
    with pytest.raises(DiskSpaceError, match="stage evaluate needs"):
        pipeline.train_version()
    assert pipeline.run.done(Stage.MERGE)
    assert not pipeline.run.done(Stage.EVALUATE)
    free_bytes(monkeypatch, 10**12)
    assert make().train_version().number == 1
    assert stages.ran.count(Stage.MERGE) == 1


@pytest.mark.slow
def test_run_can_be_resumed_after_a_stage_fills_the_disk(
    make: Make, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(stages_module, "merge_adapter", fill)
        with pytest.raises(DiskSpaceError, match="stage merge ran out of disk space"):
            make().train_version()
    make().train_version()
    assert stages.ran.count(Stage.TRAIN) == 1
