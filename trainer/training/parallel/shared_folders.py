"""Shares folders with other machines, in the object store: base models, and checkpoints.

    PREFIX.json    size and SHA-256 of each file; written last, to mark the folder complete
    PREFIX/FILE

The prefix of a base model is `bases/` and its revision, so each base is uploaded once, and each machine downloads it
once.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from svc.errors import IntegrityError
from svc.files.disk import sync_files, write_whole
from svc.registry.files import FileRecord, record_file
from svc.registry.objects import ObjectStore
from trainer.base_model.content import model_files
from trainer.training.checkpoints import RECORDS

_BASES = "bases"


def share_base(objects: ObjectStore, folder: Path, revision: str) -> str:
    """Upload a base model unless it is already in the store, and return its name there.

    Args:
        folder: folder of the base model.
        revision: identifier of the model's exact files.

    Raises:
        RegistryError: the store is not responding, or rejects the request.
    """
    name = re.sub(r"\W", "-", revision.removeprefix("sha256:"))
    if objects.read(f"{_BASES}/{name}.json") is None:
        send_folder(objects, f"{_BASES}/{name}", [record_file(folder, path) for path in model_files(folder)], folder)
    return name


def fetch_base(objects: ObjectStore, name: str, cache: Path) -> Path:
    """Return the folder of a base model, downloading it if this machine does not have it.

    Args:
        cache: this machine's folder for base models. Only one process at a time may download to it.

    Raises:
        IntegrityError, RegistryError: see `fetch_folder`.
    """
    if not (cache / name).is_dir():
        fetch_folder(objects, f"{_BASES}/{name}", cache / name)
    return cache / name


def send_folder(objects: ObjectStore, prefix: str, records: Sequence[FileRecord], folder: Path) -> None:
    """Upload a folder's files.

    Raises:
        IntegrityError: a file differs from its record.
        RegistryError: the store is not responding, or rejects the request.
    """
    objects.send(prefix, records, folder)
    objects.write(f"{prefix}.json", RECORDS.dump_json(tuple(records)))


def fetch_folder(objects: ObjectStore, prefix: str, folder: Path, list_file: str | None = None) -> None:
    """Download a folder, which appears only when it is complete. Only one process at a time may do this.

    Args:
        list_file: name of a file in the folder to which the list of the other files is written, or None for no such
            file.

    Raises:
        IntegrityError: an object is missing, truncated or altered.
        RegistryError: the store is not responding, or rejects the request.
    """
    key = f"{prefix}.json"
    try:
        records = RECORDS.validate_json(objects.read(key) or b"")
    except ValidationError:
        raise IntegrityError(f"{objects.url}/{key} is not a list of files", todo="delete the object") from None
    if any(PurePosixPath(file.path).name != file.path for file in records):
        raise IntegrityError(f"{objects.url}/{key} lists files in other folders", todo="delete the object")
    temporary = folder.with_name(f".{folder.name}-fetch")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        fetch_files(objects, prefix, records, temporary)
        if list_file is not None:
            write_whole(temporary / list_file, RECORDS.dump_json(records))
        sync_files(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fetch_files(objects: ObjectStore, prefix: str, records: Sequence[FileRecord], folder: Path) -> None:
    """Download files to a new folder. Unlike the files of versions, they are writable. Raises the same errors as
    `fetch_folder`.
    """
    folder.mkdir(parents=True)
    objects.receive(prefix, records, folder)
    for file in records:
        (folder / file.path).chmod(0o644)
