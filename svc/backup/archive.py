"""A folder of backups of one home.

    DIR/models/NAME/N/           versions, each once, for all snapshots
    DIR/snapshots/TIME/          svc.db  mlflow.db  files/  snapshot.json, which is written last
    DIR/lock

A version never changes, so it is copied once. What changes is small, and each snapshot has it whole: an older one can
be restored too. Nothing is linked with the home: what damages a file there must leave its copy alone.
"""

import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from svc.errors import IntegrityError, NotFoundError
from svc.files.disk import write_whole
from svc.registry.files import FileRecord
from svc.registry.manifest import MANIFEST_FILE
from svc.version import VersionId

STORE_FILE, TRACKING_FILE, OTHER_FILES = "svc.db", "mlflow.db", "files"
_RECORD_FILE = "snapshot.json"
_NAME = re.compile(r"\d{8}T\d{6}\.\d{3}Z")


class Snapshot(BaseModel):
    """What a home was at one time.

    Attributes:
        name: the time, in UTC, as its folder is called.
        release: of tuneserve that made it.
        versions: `NAME@N` of those that belong to it.
        files: of its own folder, which are all but its weights.
        tracking: the MLflow server that has runs and aliases; None where they are in `mlflow.db`.
        left_out: versions that are damaged, or are missing, and why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    name: str
    release: str
    versions: tuple[str, ...]
    files: tuple[FileRecord, ...]
    tracking: str | None = None
    left_out: dict[str, str] = {}


class Archive:
    """The backups in one folder.

    Args:
        folder: is made where it is not there, closed to others.
    """

    def __init__(self, folder: Path) -> None:
        self.models = folder / "models"
        self.lock = folder / "lock"
        self._folder = folder
        self._snapshots = folder / "snapshots"

    def __str__(self) -> str:
        return str(self._folder)

    def prepare(self) -> None:
        """Makes its folders. Prompts and answers lie in them."""
        for folder in (self._folder, self.models, self._snapshots):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def begin(self) -> Path:
        """A folder for the next snapshot; without a record it is none yet."""
        for left in self._folders():
            if not (left / _RECORD_FILE).is_file():  # of one that was cut off
                shutil.rmtree(left)
        # To the millisecond: MLflow goes on reading a database that was removed, under the name that it had.
        now = datetime.now(UTC)
        folder = self._snapshots / f"{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03}Z"
        folder.mkdir(mode=0o700)
        return folder

    def finish(self, snapshot: Snapshot) -> None:
        """Makes it one that can be restored."""
        write_whole(self.folder(snapshot) / _RECORD_FILE, snapshot.model_dump_json(indent=1).encode("utf-8"))

    def folder(self, snapshot: Snapshot) -> Path:
        """Where its own files are."""
        return self._snapshots / snapshot.name

    def version(self, version: VersionId) -> Path:
        """Where the copy of a version is, or would be."""
        return self.models / version.name / str(version.number)

    def newest_at(self) -> datetime | None:
        """Return when the newest finished snapshot was made; None without one. No record is read.

        Raises:
            OSError: the folder cannot be read.
        """
        finished = (folder for folder in reversed(self._folders()) if (folder / _RECORD_FILE).is_file())
        newest = next(finished, None)
        return datetime.strptime(newest.name, "%Y%m%dT%H%M%S.%f%z") if newest else None

    def snapshots(self) -> list[Snapshot]:
        """All that can be restored, the oldest first.

        Raises:
            IntegrityError: a record cannot be read.
        """
        found = []
        for path in (folder / _RECORD_FILE for folder in self._folders()):
            if not path.is_file():
                continue
            try:
                found.append(Snapshot.model_validate_json(path.read_bytes()))
            except (OSError, ValidationError) as error:
                raise IntegrityError(
                    f"cannot read {path}: {error}",
                    todo=f"take another snapshot, or remove this one: rm -r {path.parent}",
                ) from error
        return found

    def find(self, name: str | None) -> Snapshot:
        """One of them.

        Args:
            name: None for the newest.

        Raises:
            NotFoundError: there is no such snapshot.
        """
        found = self.snapshots()
        chosen = [snapshot for snapshot in found if name is None or snapshot.name == name]
        if not chosen:
            raise NotFoundError(
                f"{self} has no snapshot {name or ''}".rstrip(),
                expected=f"one of {', '.join(snapshot.name for snapshot in found) or 'none: it is no backup'}",
            )
        return chosen[-1]

    def prune(self, keep: int) -> tuple[str, ...]:
        """Removes the oldest snapshots, and versions that none is left of. Returns the snapshots.

        Args:
            keep: so many stay.
        """
        found = self.snapshots()
        gone, stay = found[:-keep], found[-keep:]
        for snapshot in gone:
            shutil.rmtree(self.folder(snapshot))
        wanted = {version for snapshot in stay for version in snapshot.versions}
        for manifest in list(self.models.glob(f"*/*/{MANIFEST_FILE}")):
            folder = manifest.parent
            if f"{folder.parent.name}@{folder.name}" not in wanted:
                hidden = folder.with_name(f".{folder.name}")
                folder.rename(hidden)
                shutil.rmtree(hidden)
        return tuple(snapshot.name for snapshot in gone)

    def _folders(self) -> list[Path]:
        if not self._snapshots.is_dir():
            return []
        return sorted(folder for folder in self._snapshots.iterdir() if _NAME.fullmatch(folder.name))
