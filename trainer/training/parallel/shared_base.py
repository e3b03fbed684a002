"""Shares a base model with other machines, in the object store.

    bases/NAME.json    size and SHA-256 of each file; written last, to mark the base complete
    bases/NAME/FILE

NAME is the base's revision, so each base is uploaded once, and each machine downloads it once.
"""

import re
import shutil
from pathlib import Path, PurePosixPath
from uuid import uuid4

from pydantic import ValidationError

from svc.errors import IntegrityError
from svc.files.disk import sync_files
from svc.registry.files import record_file
from svc.registry.objects import ObjectStore
from trainer.base_model.content import model_files
from trainer.training.checkpoints import RECORDS

_PREFIX = "bases"


def share_base(objects: ObjectStore, folder: Path, revision: str) -> str:
    """Upload a base model unless it is already in the store, and return its name there.

    Args:
        folder: folder of the base model.
        revision: identifier of the model's exact files.

    Raises:
        RegistryError: the store is not responding, or rejects the request.
    """
    name = re.sub(r"\W", "-", revision.removeprefix("sha256:"))
    if objects.read(_key(name)) is None:
        records = tuple(record_file(folder, path) for path in model_files(folder))
        objects.send(f"{_PREFIX}/{name}", records, folder)
        objects.write(_key(name), RECORDS.dump_json(records))
    return name


def fetch_base(objects: ObjectStore, name: str, cache: Path) -> Path:
    """Return the folder of a base model, downloading it if this machine does not have it.

    Args:
        cache: this machine's folder for base models. Any number of processes may share it.

    Raises:
        IntegrityError: an object is missing, truncated or altered.
        RegistryError: the store is not responding, or rejects the request.
    """
    folder = cache / name
    if folder.is_dir():
        return folder
    try:
        records = RECORDS.validate_json(objects.read(_key(name)) or b"")
    except ValidationError:
        raise IntegrityError(f"{objects.url}/{_key(name)} is not a list of files", todo="delete the object") from None
    if any(PurePosixPath(file.path).name != file.path for file in records):
        raise IntegrityError(f"{objects.url}/{_key(name)} lists files in other folders", todo="delete the object")
    temporary = cache / f".{name}-{uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        objects.receive(f"{_PREFIX}/{name}", records, temporary)
        sync_files(temporary)
        if not folder.is_dir():
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _key(name: str) -> str:
    return f"{_PREFIX}/{name}.json"
