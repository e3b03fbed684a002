"""Tests that registration resumes after an interruption, and ignores removed and damaged versions."""

from pathlib import Path

import pytest

from svc.errors import InterruptedRunError
from svc.registry.housekeeping import remove_version
from svc.registry.tracking import Tracking
from svc.version import VersionId
from tests.new_store import new_store
from tests.trainer.pipeline.stand_ins import Make

pytestmark = pytest.mark.slow


def test_repeating_an_interrupted_registration_returns_the_already_published_version(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make()

    def interrupt(self: Tracking, *arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tracking, "annotate", interrupt)
        with pytest.raises(InterruptedRunError):
            pipeline.train_version()
    (published,) = pipeline.registry.versions()
    files = sorted(path for path in pipeline.registry.folder(published).rglob("*") if path.is_file())
    before = [(path, path.stat().st_mtime_ns) for path in files]
    assert make().train_version() == published
    assert pipeline.registry.versions() == [published]
    assert [(path, path.stat().st_mtime_ns) for path in files] == before


def test_rerunning_a_recipe_whose_version_was_removed_registers_the_next_version(make: Make, tmp_path: Path) -> None:
    pipeline = make()
    first = pipeline.train_version()
    remove_version(pipeline.registry, new_store(tmp_path), first)
    assert make().train_version() == VersionId(first.name, first.number + 1)
    assert make().train_version() == VersionId(first.name, first.number + 1)


def test_registration_succeeds_when_another_version_of_the_model_is_corrupt(make: Make) -> None:
    pipeline = make()
    first = pipeline.train_version()
    manifest = pipeline.registry.folder(first) / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text("{", "utf-8")
    assert make(train={"seed": 1}).train_version().number == first.number + 1
