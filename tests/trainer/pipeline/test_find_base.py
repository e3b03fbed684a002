"""Resolution of the base that a recipe names."""

from pathlib import Path

import pytest

from svc.errors import BaseModelError, IntegrityError, NotFoundError
from svc.settings import Settings
from svc.version import Format
from trainer.pipeline.find_base import find_base
from trainer.pipeline.stages import Pipeline


def test_base_is_the_merged_model_when_a_version_is_named(pipeline: Pipeline) -> None:
    version = pipeline.train_version()
    base = find_base(str(version), pipeline.settings)
    assert base.folder == pipeline.registry.artifact(version, Format.MERGED)
    assert (base.origin, base.licence) == (str(version), "Apache-2.0")
    assert base.revision.startswith("sha256:")


def test_base_is_rejected_when_the_versions_files_were_changed(pipeline: Pipeline) -> None:
    version = pipeline.train_version()
    weights = pipeline.registry.artifact(version, Format.MERGED) / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"other")
    with pytest.raises(IntegrityError, match=r"model\.safetensors was changed"):
        find_base(str(version), pipeline.settings)


@pytest.mark.parametrize("base", ["nobody@1", "nobody@production", "@"])
def test_base_is_not_found_when_the_version_does_not_exist(tmp_path: Path, base: str) -> None:
    with pytest.raises(NotFoundError):
        find_base(base, Settings(home=tmp_path))


def test_base_is_rejected_when_its_name_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="unknown base model 'no-such-model'"):
        find_base("no-such-model", Settings(home=tmp_path, base_cache=tmp_path))
