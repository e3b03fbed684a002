"""Checkpoints on disk: whole and verified, or not there.

    checkpoints/step-00000120/   weights.safetensors  optimizer.pt  scheduler.pt  rng_state.pth  trainer_state.json
                                 files.json: size and SHA-256 of each

A checkpoint is written beside its place, synced, and renamed there, so that a kill at any moment leaves the one before.
Knows nothing of what is in the files.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from svc.errors import DiskSpaceError, IntegrityError
from svc.registry.files import FileRecord, record_files, verify_files
from svc.registry.manifest import sync_folder

log = logging.getLogger(__name__)

_FILES = "files.json"
_FULL = 1_000_000  # bytes; a disk with less cannot take another file of a checkpoint
_PREFIX, _UNFINISHED = "step-", ".unfinished-"
_RECORDS = TypeAdapter(tuple[FileRecord, ...])


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: made with the first checkpoint.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    @contextmanager
    def writing(self, step: int, best: int | None = None) -> Iterator[Path]:
        """A folder to write a checkpoint to; it takes its place, and old ones go, when the body has ended.

        Args:
            step: the optimizer's steps so far.
            best: the step whose checkpoint stays, however old.

        Raises:
            DiskSpaceError: the disk is full; the checkpoints before are kept.
        """
        temporary = self.folder / f"{_UNFINISHED}{step}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            self._seal(temporary)
            shutil.rmtree(self.at(step), ignore_errors=True)
            temporary.rename(self.at(step))
            sync_folder(self.folder)
        except Exception as error:
            full = _is_full(error, self.folder)  # before what was written makes room again
            shutil.rmtree(temporary, ignore_errors=True)
            if not full:
                raise
            raise DiskSpaceError(
                f"no room for the checkpoint of step {step} in {self.folder}",
                expected="room for one more checkpoint than checkpoints.keep says",
                todo=f"free some space and run it again: {self._newest_kept()}",
            ) from error
        self._prune(best)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are passed over."""
        for folder in reversed(self._all()):
            if self._whole(folder):
                return folder
            log.warning("checkpoint %s is damaged and passed over", folder)
        return None

    def at(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_PREFIX}*"))

    def _seal(self, folder: Path) -> None:
        """Syncs every file, and records their hashes last."""
        records = record_files(folder, folder)
        for path in folder.iterdir():
            _sync(path)
        path = folder / _FILES
        path.write_bytes(_RECORDS.dump_json(records))
        _sync(path)
        sync_folder(folder)

    def _whole(self, folder: Path) -> bool:
        try:
            verify_files(folder, _RECORDS.validate_json((folder / _FILES).read_bytes()))
        except (OSError, ValidationError, IntegrityError):
            return False
        return True

    def _prune(self, best: int | None) -> None:
        for folder in self._all()[: -self._keep]:
            if best is None or folder != self.at(best):
                shutil.rmtree(folder)
        for left in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left)

    def _newest_kept(self) -> str:
        kept = self._all()
        return f"it goes on from {kept[-1].name}" if kept else "it begins anew, since this was the first checkpoint"


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether the disk is full: torch reports a write that was cut off as a position that it did not expect."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    told = str(error)
    cut_off = "unexpected pos" in told and shutil.disk_usage(folder).free < _FULL
    return cut_off or "No space left" in told or "os error 28" in told


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
