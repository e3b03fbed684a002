"""Tests that active runs are recognized by their locks, whatever else is in their folders."""

from pathlib import Path

import pytest

from svc.files.lock import hold_lock
from svc.registry.training_runs import TrainingRun, find_training_runs
from tests.svc.chats import chat


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a `tiny` run that was interrupted before it had a run in MLflow."""
    folder = tmp_path / "runs" / "tiny-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "lock").write_text('{"pid": 1}')
    return folder


def test_empty_tuneserve_home_has_no_training_runs(tmp_path: Path) -> None:
    assert list(find_training_runs(tmp_path)) == []


def test_run_is_active_while_its_lock_is_held(folder: Path, tmp_path: Path) -> None:
    with hold_lock(folder / "lock", "a run"):
        assert list(find_training_runs(tmp_path)) == [TrainingRun("tiny", running=True)]


def test_run_is_inactive_when_its_lock_is_free(folder: Path, tmp_path: Path) -> None:
    assert list(find_training_runs(tmp_path)) == [TrainingRun("tiny", running=False)]


def test_run_name_may_contain_hyphens(folder: Path, tmp_path: Path) -> None:
    folder.rename(folder.with_name("tiny-quick-0123456789ab"))
    assert [run.name for run in find_training_runs(tmp_path)] == ["tiny-quick"]


def test_training_run_being_removed_is_not_listed(folder: Path, tmp_path: Path) -> None:
    folder.rename(folder.with_name(".removed-tiny-0123456789ab"))
    assert list(find_training_runs(tmp_path)) == []


@pytest.mark.slow
def test_runs_created_by_the_trainer_are_listed(tmp_path: Path) -> None:
    """File names of the trainer are repeated in the registry, because svc does not import the trainer."""
    from trainer.base_model.resolve import Base
    from trainer.pipeline.examples import Examples
    from trainer.pipeline.run_folder import Run
    from trainer.pipeline.tracked_run import tracked_run
    from trainer.recipe.recipe import Recipe

    recipe = Recipe.model_validate({"name": "tiny", "base": "./base", "data": {"train": "train.jsonl"}})
    examples = (chat("question"),)
    run = Run.of(
        tmp_path / "runs",
        recipe,
        Base(tmp_path, "./base", None, "sha256:0"),
        Examples(examples, examples, "sha256:1", "sha256:2", examples),
    )
    with hold_lock(run.lock, "a run"):
        tracked_run(run.tracking, lambda: "abc")
        assert list(find_training_runs(tmp_path)) == [TrainingRun("tiny", running=True, tracking_run="abc")]
