"""Tests that another machine gets a base model from an object store, once."""

from pathlib import Path

import pytest

from svc.errors import IntegrityError
from svc.registry.objects import ObjectStore
from trainer.training.parallel.shared_folders import fetch_base, share_base

REVISION = "sha256:" + "a" * 64


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    (tmp_path / "store").mkdir()
    return ObjectStore((tmp_path / "store").as_uri())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_base(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    for name, content in {
        "config.json": b"{}",
        "model.safetensors": weights,
        "chat_template.jinja": b"{{ x }}",
    }.items():
        (folder / name).write_bytes(content)
    return folder


def test_fetched_base_has_the_same_files_as_the_uploaded_base(tmp_path: Path, objects: ObjectStore) -> None:
    base = write_base(tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"pickled")
    fetched = fetch_base(objects, share_base(objects, base, REVISION), tmp_path / "cache")
    (base / "pytorch_model.bin").unlink()
    assert contents(fetched) == contents(base)


def test_base_is_uploaded_and_downloaded_only_once(tmp_path: Path, objects: ObjectStore) -> None:
    base = write_base(tmp_path / "base")
    name = share_base(objects, base, REVISION)
    for path in base.iterdir():
        path.unlink()
    assert share_base(objects, base, REVISION) == name
    fetched = fetch_base(objects, name, tmp_path / "cache")
    objects.delete(objects.keys("bases"))
    assert fetch_base(objects, name, tmp_path / "cache") == fetched


def test_fetching_a_base_with_an_altered_file_leaves_no_files(tmp_path: Path, objects: ObjectStore) -> None:
    name = share_base(objects, write_base(tmp_path / "base"), REVISION)
    objects.write(f"bases/{name}/model.safetensors", b"weightz")
    with pytest.raises(IntegrityError, match="was altered"):
        fetch_base(objects, name, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_interrupted_upload_of_a_base_is_resumed(tmp_path: Path, objects: ObjectStore) -> None:
    base = write_base(tmp_path / "base")
    name = share_base(objects, base, REVISION)
    objects.delete([f"bases/{name}.json", f"bases/{name}/config.json"])
    with pytest.raises(IntegrityError, match="is not a list of files"):
        fetch_base(objects, name, tmp_path / "cache")
    share_base(objects, base, REVISION)
    assert contents(fetch_base(objects, name, tmp_path / "cache")) == contents(base)
