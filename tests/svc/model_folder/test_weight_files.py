"""Tests which files in a folder from the hub are weight files."""

import json
from pathlib import Path

import pytest

from svc.errors import IntegrityError
from svc.model_folder.weight_files import WEIGHTS_INDEX, weight_files

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_folder(folder: Path, *names: str, index: object = None) -> Path:
    for name in names:
        (folder / name).write_bytes(b"weights")
    if index is not None:
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index), "utf-8")
    return folder


def test_weight_index_determines_the_weight_files_if_a_folder_has_two_copies_of_the_weights(tmp_path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[1]}}
    write_folder(tmp_path, *SHARDS, "consolidated.safetensors", index=index)
    assert [path.name for path in weight_files(tmp_path)] == list(SHARDS)


def test_all_safetensors_files_are_weight_files_if_there_is_no_weight_index(tmp_path: Path) -> None:
    write_folder(tmp_path, "b.safetensors", "a.safetensors", "model.bin")
    assert [path.name for path in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": [SHARDS[0]]}, {"weight_map": {"a": 1}}, {"weight_map": "a"}]
)
def test_weight_index_without_files_is_rejected(tmp_path: Path, index: object) -> None:
    write_folder(tmp_path, *SHARDS, index=index)
    with pytest.raises(IntegrityError, match="does not list the weight files"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "original/model.safetensors"])
def test_weight_index_with_a_file_outside_the_folder_is_rejected(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, *SHARDS, index={"weight_map": {"a": SHARDS[0], "b": name}})
    with pytest.raises(IntegrityError, match="does not list the weight files"):
        weight_files(tmp_path)
