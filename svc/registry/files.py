"""Hashes and safetensors headers of a version's files. Headers are read without loading the weights."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from svc.errors import IntegrityError
from svc.model_folder.weight_files import weight_files

_BLOCK = 2**24  # bytes


class FileRecord(BaseModel):
    """A manifest's record of one file. `path` is relative to the version's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


@dataclass(frozen=True, slots=True, order=True)
class Tensor:
    """A tensor's entry in a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def record_file(root: Path, path: Path) -> FileRecord:
    """Return the record of a file: its path, size and hash.

    Args:
        root: the version's folder, to which the path is relative.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path=path.relative_to(root).as_posix(), sha256=digest, bytes=path.stat().st_size)


def record_files(root: Path, folder: Path) -> tuple[FileRecord, ...]:
    """Return the records of all files below a folder, sorted by path.

    Args:
        root: the version's folder, to which paths are relative.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(record_file(root, path) for path in files)


def verify_files(root: Path, records: Iterable[FileRecord]) -> None:
    """Check files on disk against their records.

    Raises:
        IntegrityError: a file is missing or was changed; the error names the first such file.
    """
    for record in records:
        path = root / record.path
        if not path.is_file():
            raise IntegrityError(
                f"{path} is missing", todo="restore the version's folder from a backup, or train again"
            )
        current = record_file(root, path)
        if current != record:
            raise IntegrityError(
                f"{path} was changed after registration: sha256 {current.sha256[:12]}…, {current.bytes} bytes",
                expected=f"sha256 {record.sha256[:12]}…, {record.bytes} bytes",
                todo="restore the file from a backup, or train again; registered versions must not be edited",
            )


def read_headers(folder: Path) -> tuple[Tensor, ...]:
    """Return the name, data type and shape of each tensor in a model folder, sorted by name.

    Raises:
        IntegrityError: there is no weight file, or a weight file is incomplete or damaged.
    """
    from safetensors import SafetensorError, safe_open

    tensors: list[Tensor] = []
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - the object is not a mapping
                    part = file.get_slice(name)
                    tensors.append(Tensor(name, str(part.get_dtype()), tuple(part.get_shape())))
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{path} is not a complete safetensors file: {error}") from error
    if not tensors:
        raise IntegrityError(f"{folder} contains no safetensors files", expected="a folder with a model's weights")
    return tuple(sorted(tensors))


def hash_tensor(folder: Path, name: str) -> str:
    """Return the SHA-256 of a tensor's bytes.

    Args:
        name: a tensor's name, as returned by `read_headers`.

    Raises:
        IntegrityError: no file in the folder contains the tensor.
    """
    for path in weight_files(folder):
        with path.open("rb") as file:
            # The format: the header's length in 8 bytes, the header as JSON, then all tensors.
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            if name not in header:
                continue
            start, end = header[name]["data_offsets"]
            file.seek(8 + size + start)
            digest, remaining = hashlib.sha256(), end - start
            while remaining > 0 and (part := file.read(min(_BLOCK, remaining))):
                digest.update(part)
                remaining -= len(part)
            return digest.hexdigest()
    raise IntegrityError(f"{folder} has no tensor {name}", expected="a complete model folder")
