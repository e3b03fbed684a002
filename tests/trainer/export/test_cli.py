"""Tests `svc export` on a registered version."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample
from svc.registry.manifest import write_manifest
from svc.registry.registry import HELDOUT_FILE, REFERENCE_FOLDER
from svc.version import VersionId
from tests.command_line import Svc
from tests.svc.registry.manifests import make_manifest
from tests.trainer.conftest import make_model

pytestmark = pytest.mark.slow


@pytest.fixture
def make_version(tmp_path: Path, examples: list[ChatExample]) -> Callable[[str], Path]:
    """Return a function that registers `tiny@1` with one format, and returns its folder."""

    def make(format: str) -> Path:
        folder = tmp_path / "home" / "models" / "tiny" / "1"
        (folder / REFERENCE_FOLDER).mkdir(parents=True)
        write_examples(folder / HELDOUT_FILE, examples)
        make_model(folder / format)
        write_manifest(folder, make_manifest(VersionId("tiny", 1), folder))
        return folder

    return make


def test_version_is_exported_as_gguf_with_a_modelfile(
    svc: Svc, tmp_path: Path, make_version: Callable[[str], Path], examples: list[ChatExample]
) -> None:
    make_version("merged")
    out = tmp_path / "out"
    ended = svc("--home", tmp_path / "home", "export", "tiny@1", "--format", "gguf", "--to", out, "--json")
    assert ended.code == 0
    result = json.loads(ended.out)
    assert result["file"] == str(out / "tiny-1-q8_0.gguf")
    assert (result["pre"], result["compared"]) == ("gpt-2", len(examples))
    assert {path.name for path in out.iterdir()} == {"Modelfile", "tiny-1-q8_0.gguf"}


def test_merged_version_is_exported_as_a_copy_of_its_merged_folder(
    svc: Svc, tmp_path: Path, make_version: Callable[[str], Path]
) -> None:
    merged = make_version("merged") / "merged"
    ended = svc("--home", tmp_path / "home", "export", "tiny", "--format", "hf", "--to", tmp_path / "out")
    assert ended.code == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in merged.iterdir()
    }


@pytest.mark.parametrize("exists", [False, True])
def test_interrupted_export_leaves_no_files(
    svc: Svc, tmp_path: Path, make_version: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    make_version("merged")
    copied: list[Path] = []

    def copy_two_files(source: Path, target: Path) -> None:
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(Path(target))
        copied[-1].write_bytes(b"part")

    out = tmp_path / "exports" / "out"
    if exists:
        out.mkdir(parents=True)
    monkeypatch.setattr("shutil.copyfile", copy_two_files)
    assert svc("--home", tmp_path / "home", "export", "tiny@1", "--format", "hf", "--to", out).code == 130
    assert len(copied) == 2
    assert not out.exists() or (exists and list(out.iterdir()) == [])


def test_export_to_a_non_empty_folder_is_rejected(
    svc: Svc, tmp_path: Path, make_version: Callable[[str], Path]
) -> None:
    make_version("merged")
    (tmp_path / "precious").touch()
    ended = svc("--home", tmp_path / "home", "export", "tiny@1", "--format", "hf", "--to", tmp_path)
    assert ended.code == 7
    assert "is not empty" in ended.err


def test_export_of_a_version_without_merged_weights_is_rejected(
    svc: Svc, tmp_path: Path, make_version: Callable[[str], Path]
) -> None:
    make_version("adapter")
    ended = svc("--home", tmp_path / "home", "export", "tiny@1", "--format", "gguf", "--to", tmp_path / "out")
    assert ended.code == 8
    assert "tiny@1 has no merged weights" in ended.err


def test_damaged_weights_are_not_exported(svc: Svc, tmp_path: Path, make_version: Callable[[str], Path]) -> None:
    path = make_version("merged") / "merged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    ended = svc("--home", tmp_path / "home", "export", "tiny@1", "--format", "hf", "--to", tmp_path / "out")
    assert ended.code == 9
    assert not (tmp_path / "out").exists()
