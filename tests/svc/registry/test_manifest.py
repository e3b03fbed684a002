"""Tests that a manifest is rejected unless it is complete and belongs to its version."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svc.errors import IntegrityError
from svc.evaluation.evaluator import EvaluationReport
from svc.registry.manifest import MANIFEST_FILE, FormatRecord, Manifest, read_manifest, write_manifest
from svc.version import Format, VersionId
from tests.svc.registry.manifests import gate_report, make_manifest, report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of tiny@3, which contains its held-out set."""
    folder = tmp_path / "tiny" / "3"
    folder.mkdir(parents=True)
    (folder / "heldout.jsonl").touch()
    return folder


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    return make_manifest(VersionId("tiny", 3), folder)


def test_written_manifest_is_read_back_unchanged(folder: Path, manifest: Manifest) -> None:
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    assert manifest.id == VersionId("tiny", 3)


def test_failed_or_passed_gates_are_not_listed_as_undecided(folder: Path) -> None:
    made = make_manifest(VersionId("tiny", 3), folder, gates=(gate_report(0.04), gate_report(0.09)))
    write_manifest(folder, made)
    (undecided,) = read_manifest(folder).undecided
    assert "a loss of up to 0.090 cannot be excluded with 60 examples; about 500 would decide" in undecided
    assert made.model_copy(update={"failed": (undecided,)}).undecided == ()


@pytest.mark.parametrize("base_evaluation", [report(), None], ids=["beside its base", "in the format that is served"])
def test_manifest_includes_the_number_of_evaluated_examples(
    folder: Path, base_evaluation: EvaluationReport | None
) -> None:
    (folder / "gptq").mkdir()
    made = make_manifest(VersionId("tiny", 3), folder, base_evaluation=base_evaluation)
    assert made.judged_examples == 2


def test_version_with_only_an_adapter_has_no_evaluated_examples(folder: Path) -> None:
    (folder / "adapter").mkdir()
    adapter = FormatRecord(files=())
    assert make_manifest(VersionId("tiny", 3), folder, formats={Format.ADAPTER: adapter}).judged_examples == 0


def test_writing_the_manifest_leaves_no_temporary_file(folder: Path, manifest: Manifest) -> None:
    write_manifest(folder, manifest)
    assert {path.name for path in folder.iterdir()} == {MANIFEST_FILE, "heldout.jsonl"}


def test_manifest_is_written_atomically(folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", cut_off)
    with pytest.raises(OSError, match="no space left"):
        write_manifest(folder, manifest)
    assert not (folder / MANIFEST_FILE).exists()


@pytest.mark.parametrize(("name", "number"), [("tiny", "4"), ("other", "3")])
def test_manifest_with_a_mismatched_version_id_is_rejected(
    folder: Path, manifest: Manifest, tmp_path: Path, name: str, number: str
) -> None:
    write_manifest(folder, manifest)
    elsewhere = tmp_path / name / number
    elsewhere.mkdir(parents=True)
    (elsewhere / MANIFEST_FILE).write_bytes((folder / MANIFEST_FILE).read_bytes())
    with pytest.raises(IntegrityError, match="is the manifest of tiny@3") as caught:
        read_manifest(elsewhere)
    assert caught.value.expected == f"{name}@{number}"


def test_missing_manifest_raises_integrity_error(folder: Path) -> None:
    with pytest.raises(IntegrityError, match=r"cannot read .*manifest\.json"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("recipe", "limit"),
    [
        ({"evaluate": {"max_tokens": 5}}, 5),
        ({"evaluate": {"max_tokens": None}}, None),
        ({"evaluate": {}}, None),
        ({}, None),
    ],
)
def test_answer_limit_in_a_manifest_comes_from_the_recipe_or_is_none(
    manifest: Manifest, recipe: dict[str, Any], limit: int | None
) -> None:
    assert manifest.model_copy(update={"recipe": recipe}).max_answer_tokens == limit


Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.pop("formats"),
        lambda content: content.pop("reference"),
        lambda content: content.pop("failed"),
        lambda content: content.update(note="x"),
        lambda content: content.update(schema_version=2),
        lambda content: content.update(number=0),
        lambda content: content.update(name="../tiny"),
        lambda content: content["heldout"].update(sha256="0"),
        lambda content: content.update(formats={"onnx": {"files": []}}),
    ],
)
def test_manifest_with_invalid_content_is_rejected(folder: Path, manifest: Manifest, edit: Edit) -> None:
    content = manifest.model_dump(mode="json")
    edit(content)
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(IntegrityError):
        read_manifest(folder)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_truncated_manifest_is_rejected(folder: Path, manifest: Manifest, cut: int) -> None:
    write_manifest(folder, manifest)
    (folder / MANIFEST_FILE).write_bytes((folder / MANIFEST_FILE).read_bytes()[:cut])
    with pytest.raises(IntegrityError, match="cannot read"):
        read_manifest(folder)
