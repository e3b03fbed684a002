"""Tests which versions stay on a machine of a Ray cluster."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from serving.engines.ray.files import NodeModels
from serving.engines.ray.link import ModelFiles
from svc.errors import IntegrityError
from svc.registry.objects import ObjectStore
from svc.registry.registry import HELDOUT_FILE
from svc.version import Format, Target, VersionId
from tests.svc.registry.manifests import make_manifest

NAME = "tuned"
SIZE = 1000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URL of a store with five versions of 1000 bytes each."""
    folder = tmp_path_factory.mktemp("versions")
    (folder / "store").mkdir()
    for number in range(1, 6):
        version = folder / NAME / str(number)
        (version / "merged").mkdir(parents=True)
        (version / "merged" / "model.safetensors").write_bytes(bytes([number]) * SIZE)
        (version / HELDOUT_FILE).write_text("{}\n")
        ObjectStore((folder / "store").as_uri()).upload(make_manifest(VersionId(NAME, number), version), version)
    return (folder / "store").as_uri()


@pytest.fixture
def models(tmp_path: Path) -> Iterator[NodeModels]:
    with closing(NodeModels(tmp_path)) as models:
        yield models


def fetch(models: NodeModels, store: str, *numbers: int) -> None:
    """Fetch versions, each of which was last used long before the next."""
    for number in numbers:
        target = Target(VersionId(NAME, number), Format.MERGED)
        path = models.fetch(ModelFiles(artifacts=store, target=target, path=Path("/elsewhere")))
        os.utime(path, (number, number))


def present(folder: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in folder.glob("models/*/*/merged"))


def test_downloaded_versions_are_not_evicted_without_a_size_limit(
    tmp_path: Path, models: NodeModels, store: str
) -> None:
    fetch(models, store, 1, 2, 3, 4)
    assert present(tmp_path) == [1, 2, 3, 4]


def test_least_recently_used_versions_are_evicted_before_a_download_exceeds_the_size_limit(
    tmp_path: Path, models: NodeModels, store: str
) -> None:
    fetch(models, store, 1, 2, 3, 4)
    models.max_bytes = 3 * SIZE
    fetch(models, store, 5)
    assert present(tmp_path) == [3, 4, 5]


def test_no_version_is_evicted_if_the_requested_version_is_already_present(
    tmp_path: Path, models: NodeModels, store: str
) -> None:
    fetch(models, store, 1, 2, 3, 4)
    models.max_bytes = SIZE
    fetch(models, store, 4)
    assert present(tmp_path) == [1, 2, 3, 4]


def test_most_recently_used_version_is_evicted_last(tmp_path: Path, models: NodeModels, store: str) -> None:
    fetch(models, store, 1, 2, 3, 4)
    os.utime(tmp_path / "models" / NAME / "1" / "merged", (9, 9))
    models.max_bytes = 4 * SIZE
    fetch(models, store, 5)
    assert present(tmp_path) == [1, 3, 4, 5]


@pytest.mark.slow
def test_versions_used_by_other_engines_on_a_machine_are_not_evicted_until_those_engines_stop(
    tmp_path: Path, models: NodeModels, store: str
) -> None:
    with closing(NodeModels(tmp_path)) as other:
        fetch(other, store, 1, 2)
        models.max_bytes = SIZE
        fetch(models, store, 3)
        assert present(tmp_path) == [1, 2, 3]
    fetch(models, store, 4)
    assert present(tmp_path) == [3, 4]


@pytest.mark.slow
def test_version_that_an_engine_may_roll_back_to_is_not_evicted(tmp_path: Path, models: NodeModels, store: str) -> None:
    models.max_bytes = SIZE
    fetch(models, store, 1, 2)
    assert present(tmp_path) == [1, 2]


@pytest.mark.slow
def test_evicted_version_is_downloaded_again_when_needed(tmp_path: Path, models: NodeModels, store: str) -> None:
    models.max_bytes = SIZE
    fetch(models, store, 1, 2, 3, 4, 1)
    path = tmp_path / "models" / NAME / "1" / "merged" / "model.safetensors"
    assert path.read_bytes() == b"\1" * SIZE


@pytest.mark.slow
def test_version_whose_download_failed_can_be_evicted(tmp_path: Path, models: NodeModels, store: str) -> None:
    fetch(models, store, 1)
    path = tmp_path / "models" / NAME / "1" / "merged" / "model.safetensors"
    path.chmod(0o644)
    path.write_bytes(b"x" * SIZE)
    with pytest.raises(IntegrityError):
        fetch(models, store, 1)
    models.max_bytes = SIZE
    fetch(models, store, 2, 3, 4)
    assert 1 not in present(tmp_path)
