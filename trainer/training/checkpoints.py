"""Checkpoints on disk: whole and verified, or not there.

    checkpoints/step-00000120/   weights.safetensors  optimizer.pt  scheduler.pt  rng_state.pth  trainer_state.json
                                 in float16: scaler.pt; AdaLoRA: rank_allocator.safetensors
                                 files.json: size and SHA-256 of each

A checkpoint is written beside its place, synced, and renamed there, so that a kill at any moment leaves the one before.
Knows nothing of what is in the files.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from svc.errors import DiskSpaceError, IntegrityError
from svc.files.disk import is_full, sync_files, sync_folder, write_whole
from svc.registry.files import FileRecord, record_files, verify_files

log = logging.getLogger(__name__)

_FILES = "files.json"
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

        Later ones go too: they are damaged, since the run goes on from one before, and would pass for the newest.

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
            full = is_full(error, self.folder)  # before what was written makes room again
            shutil.rmtree(temporary, ignore_errors=True)
            if not full:
                raise
            raise DiskSpaceError(
                f"no room for the checkpoint of step {step} in {self.folder}",
                expected="room for one more checkpoint than checkpoints.keep says",
                todo=f"free some space and run it again: {self._newest_kept()}",
            ) from error
        self._prune(step, best)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are passed over."""
        for folder in reversed(self._all()):
            if self._whole(folder):
                return folder
            log.warning("checkpoint %s is damaged and passed over", folder)
        return None

    def whole(self, step: int) -> Path:
        """The checkpoint of a step.

        Raises:
            IntegrityError: it is missing or damaged.
        """
        if not self._whole(self.at(step)):
            raise IntegrityError(
                f"checkpoint {self.at(step)} is missing or damaged, and is the one with the lowest held-out loss",
                todo=f"remove {self.folder} and train again, or set stopping.keep_best to false",
            )
        return self.at(step)

    def at(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_PREFIX}*"))

    def _seal(self, folder: Path) -> None:
        """Syncs every file, and records their hashes last."""
        records = record_files(folder, folder)
        sync_files(folder)
        write_whole(folder / _FILES, _RECORDS.dump_json(records))

    def _whole(self, folder: Path) -> bool:
        try:
            verify_files(folder, _RECORDS.validate_json((folder / _FILES).read_bytes()))
        except (OSError, ValidationError, IntegrityError):
            return False
        return True

    def _prune(self, step: int, best: int | None) -> None:
        later = [folder for folder in self._all() if folder > self.at(step)]
        old = [folder for folder in self._all() if folder not in later][: -self._keep]
        for folder in later + [folder for folder in old if best is None or folder != self.at(best)]:
            shutil.rmtree(folder)
        for left in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left)

    def _newest_kept(self) -> str:
        kept = self._all()
        return f"it goes on from {kept[-1].name}" if kept else "it begins anew, since this was the first checkpoint"
