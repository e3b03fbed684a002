"""Tests that files are identified by their content, and that every change is detected and named."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from svc.errors import IntegrityError
from svc.registry.files import FileRecord, Tensor, hash_tensor, read_headers, record_file, record_files, verify_files
from tests.svc.registry.model_folder import write_model


def test_file_record_has_a_path_a_hash_and_a_size(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "x").write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert record_file(tmp_path, tmp_path / "merged" / "x") == FileRecord(path="merged/x", sha256=sha256, bytes=3)


def test_all_files_below_a_folder_are_recorded_in_order(tmp_path: Path) -> None:
    for path in ("m/b", "m/a", "m/deep/c", "other"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert [record.path for record in record_files(tmp_path, tmp_path / "m")] == ["m/a", "m/b", "m/deep/c"]


def test_unchanged_files_pass_verification(tmp_path: Path) -> None:
    write_model(tmp_path / "merged")
    verify_files(tmp_path, record_files(tmp_path, tmp_path / "merged"))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (flip_a_byte, "was changed after registration"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "was changed after registration"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "was changed after registration"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: (path.unlink(), path.mkdir()), "is missing"),
    ],
    ids=["flipped", "shorter", "longer", "missing", "a folder"],
)
def test_modified_or_missing_version_file_is_named_in_the_error(
    tmp_path: Path, change: Callable[[Path], object], text: str
) -> None:
    write_model(tmp_path / "merged")
    records = record_files(tmp_path, tmp_path / "merged")
    change(tmp_path / "merged" / "model.safetensors")
    with pytest.raises(IntegrityError, match=text) as caught:
        verify_files(tmp_path, records)
    assert str(tmp_path / "merged" / "model.safetensors") in caught.value.wrong
    assert caught.value.todo


def test_tensor_headers_have_a_name_a_type_and_a_shape(tmp_path: Path) -> None:
    save_file({"b": np.zeros((2, 3), np.float32)}, tmp_path / "1.safetensors")
    save_file({"a": np.zeros(4, np.int32)}, tmp_path / "2.safetensors")
    assert read_headers(tmp_path) == (Tensor("a", "I32", (4,)), Tensor("b", "F32", (2, 3)))


def test_truncated_weight_file_is_detected(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(IntegrityError, match=r"model\.safetensors is not a complete safetensors file"):
        read_headers(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle", b"\xff" * 64])
def test_non_safetensors_weight_file_is_detected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match="not a complete safetensors file"):
        read_headers(tmp_path)


def test_folder_without_safetensors_files_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(IntegrityError, match="contains no safetensors file"):
        read_headers(tmp_path)


def test_tensor_hash_depends_only_on_the_tensor_bytes(tmp_path: Path) -> None:
    one, other = np.arange(8, dtype=np.float32), np.ones((3, 3), np.float16)
    save_file({"a": one, "b": other}, tmp_path / "model-1.safetensors")
    save_file({"c": one}, tmp_path / "model-2.safetensors")
    assert hash_tensor(tmp_path, "b") == hashlib.sha256(other.tobytes()).hexdigest()
    assert hash_tensor(tmp_path, "a") == hash_tensor(tmp_path, "c") == hashlib.sha256(one.tobytes()).hexdigest()
    with pytest.raises(IntegrityError, match="has no tensor d"):
        hash_tensor(tmp_path, "d")
