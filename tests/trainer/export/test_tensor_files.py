"""Tests that files written tensor by tensor are identical to those safetensors writes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.export import tensor_files
from trainer.export.tensor_files import open_tensor_files

TENSORS = {
    "b.weight": torch.randn(3, 5).bfloat16(),
    "a.weight": torch.randn(7).bfloat16(),
    "a.positions": torch.arange(6).reshape(2, 3),
    "scale": torch.tensor(0.5).bfloat16(),
    "transposed": torch.randn(4, 2).bfloat16().T,
}


def write(folder: Path, names: list[str]) -> None:
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in TENSORS.items()}
    with open_tensor_files(folder, shapes, parameters=99) as write_tensor:
        for name in names:
            write_tensor(name, TENSORS[name])


@pytest.mark.parametrize("names", [list(TENSORS), sorted(TENSORS), sorted(TENSORS, reverse=True)])
def test_tensor_file_is_identical_to_safetensors_output_regardless_of_tensor_order(
    tmp_path: Path, names: list[str]
) -> None:
    write(tmp_path / "out", names)
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(contiguous, tmp_path / "expected.safetensors", {"format": "pt"})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    written, expected = tmp_path / "out" / "model.safetensors", tmp_path / "expected.safetensors"
    assert written.read_bytes() == expected.read_bytes()


def test_index_names_the_file_of_each_tensor_when_several_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "_MAX_FILE_SIZE", 50)
    write(tmp_path, list(TENSORS))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"] == {
        "total_parameters": 99,
        "total_size": sum(tensor.nbytes for tensor in TENSORS.values()),
    }
    assert len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])
