"""A folder that contains the backups of one home folder.

    DIR/models/NAME/N/           versions, each stored once for all snapshots
    DIR/contents/SHA256          contents of clients' files, each stored once for all snapshots
    DIR/snapshots/TIME/          svc.db  mlflow.db  files/  contents.json  snapshot.json (written last)
    DIR/lock

A database on a server (`store.url`, `tracking_uri`) is not included.

Versions and clients' files never change, so each is copied only once. Everything else is small and is copied into each
snapshot, so that older snapshots can be restored too. Hard links to files in the home folder are not used, because
damage to those files would also affect the backup.
"""

import logging
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from serving.files.rows import FileContent
from svc.errors import IntegrityError, NotFoundError
from svc.files.backup_snapshots import RECORD_FILE, snapshot_folders
from svc.files.disk import write_whole
from svc.registry.files import FileRecord
from svc.registry.manifest import MANIFEST_FILE
from svc.version import VersionId

log = logging.getLogger(__name__)

STORE_FILE, TRACKING_FILE, OTHER_FILES = "svc.db", "mlflow.db", "files"
CONTENTS_FILE = "contents.json"
"""File that lists the contents of clients' files. It is separate from the snapshot's record, so that earlier releases
can still read the record."""
CONTENTS = TypeAdapter(tuple[FileContent, ...])
"""Converts that list to JSON and back."""


class Snapshot(BaseModel):
    """A copy of a home folder's state at one point in time.

    Attributes:
        name: time of the snapshot in UTC, which is also its folder's name.
        release: tuneserve release that created the snapshot.
        versions: names of the included versions, as `NAME@N`.
        files: records of the files in the snapshot's own folder, which contains everything except versions and the
            contents of clients' files.
        tracking: MLflow server that stores runs and aliases, or None if they are in `mlflow.db`.
        store: PostgreSQL database that is the store, or None if it is in `svc.db`.
        left_out: for each damaged or missing version or client file, the reason why it is not included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    name: str
    release: str
    versions: tuple[str, ...]
    files: tuple[FileRecord, ...]
    tracking: str | None = None
    store: str | None = None
    left_out: dict[str, str] = {}


class Archive:
    """A folder that contains the backups of one home folder.

    Args:
        folder: path of the folder. If it does not exist, it is created with owner-only permissions.
    """

    def __init__(self, folder: Path) -> None:
        self.models = folder / "models"
        self.contents = folder / "contents"
        self.lock = folder / "lock"
        self._folder = folder
        self._snapshots = folder / "snapshots"

    def __str__(self) -> str:
        return str(self._folder)

    def prepare(self) -> None:
        """Create the archive's folders with owner-only permissions, because they will contain prompts and answers."""
        for folder in (self._folder, self.models, self.contents, self._snapshots):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def begin(self) -> Path:
        """Remove the folders of unfinished snapshots, and create a folder for the next snapshot.

        The new folder is ignored until `finish` has written the snapshot's record.
        """
        for unfinished in snapshot_folders(self._folder):
            if not (unfinished / RECORD_FILE).is_file():  # of an interrupted backup
                shutil.rmtree(unfinished)
        # To the millisecond: MLflow continues to read a removed database under its old name.
        now = datetime.now(UTC)
        folder = self._snapshots / f"{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03}Z"
        folder.mkdir(mode=0o700)
        return folder

    def finish(self, snapshot: Snapshot) -> None:
        """Write a snapshot's record. Only snapshots with a record can be restored."""
        write_whole(self.folder(snapshot) / RECORD_FILE, snapshot.model_dump_json(indent=1).encode("utf-8"))

    def folder(self, snapshot: Snapshot) -> Path:
        """Return the folder of a snapshot's files, except those that snapshots share: versions and clients' files."""
        return self._snapshots / snapshot.name

    def version(self, version: VersionId) -> Path:
        """Return the path of the archive's copy of a version. The folder may not exist yet."""
        return self.models / version.name / str(version.number)

    def contents_of(self, snapshot: Snapshot) -> tuple[FileContent, ...]:
        """Return the list of clients' files whose contents are in a snapshot.

        Raises:
            ValueError: the list is damaged.
        """
        path = self.folder(snapshot) / CONTENTS_FILE
        return CONTENTS.validate_json(path.read_bytes()) if path.exists() else ()

    def snapshots(self) -> list[Snapshot]:
        """Return all restorable snapshots, oldest first.

        Raises:
            IntegrityError: a snapshot's record cannot be read.
        """
        found = []
        for path in (folder / RECORD_FILE for folder in snapshot_folders(self._folder)):
            if not path.is_file():
                continue
            try:
                found.append(Snapshot.model_validate_json(path.read_bytes()))
            except (OSError, ValidationError) as error:
                raise IntegrityError(
                    f"cannot read {path}: {error}",
                    todo=f"remove this snapshot: rm -r {path.parent}",
                ) from error
        return found

    def find(self, name: str | None) -> Snapshot:
        """Return the snapshot with the given name.

        Args:
            name: name of the snapshot, or None for the newest.

        Raises:
            NotFoundError: there is no such snapshot.
        """
        found = self.snapshots()
        chosen = [snapshot for snapshot in found if name is None or snapshot.name == name]
        if not chosen:
            raise NotFoundError(
                f"{self} has no snapshot {name or ''}".rstrip(),
                expected=f"one of {', '.join(each.name for each in found)}" if found else "a folder with backups",
            )
        return chosen[-1]

    def prune(self, keep: int) -> tuple[str, ...]:
        """Remove the oldest snapshots, and versions and contents that no remaining snapshot includes.

        The result contains the names of the removed snapshots.

        Args:
            keep: number of snapshots to keep.
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
        self._prune_contents(stay)
        return tuple(snapshot.name for snapshot in gone)

    def _prune_contents(self, stay: Iterable[Snapshot]) -> None:
        try:
            wanted = {content.sha256 for snapshot in stay for content in self.contents_of(snapshot)}
        except (OSError, ValueError):  # it is unknown what the damaged snapshot needs
            log.exception("cannot tell which client files in %s are still needed; removing none", self)
            return
        for path in self.contents.iterdir() if self.contents.is_dir() else ():
            if path.name not in wanted:
                path.unlink()
