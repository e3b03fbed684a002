"""Stores checkpoints on disk. A checkpoint either exists in full, with verified files, or does not exist.

    checkpoints/step-00000120/   weights.safetensors  optimizer.pt  scheduler.pt  rng_state.pth
    trainer_state.json
                                 in float16: scaler.pt; AdaLoRA: rank_allocator.safetensors;
                                 PiSSA and OLoRA: first_matrices.safetensors
                                 files.json: size and SHA-256 of each

A checkpoint is written to a temporary folder, synced, and renamed, so that the previous checkpoint stays intact even if
the process is killed at any time. This module does not depend on what the files contain.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from svc.errors import DiskSpaceError, IntegrityError
from svc.files.disk import is_full, sync_files, sync_folder, write_whole
from svc.registry.files import FileRecord, record_files, verify_files

log = logging.getLogger(__name__)

FILES = "files.json"
PREFIX, _UNFINISHED = "step-", ".unfinished-"
RECORDS = TypeAdapter(tuple[FileRecord, ...])


class CheckpointFolder:
    """The checkpoints of one training run.

    Args:
        folder: checkpoint folder, created with the first checkpoint.
        keep: number of newest checkpoints to keep.
        on_written: called with the path of each new checkpoint.
    """

    def __init__(self, folder: Path, keep: int, on_written: Callable[[Path], None] | None = None) -> None:
        self.folder = folder
        self._keep = keep
        self._on_written = on_written

    @contextmanager
    def writing(self, step: int, best: int | None = None) -> Iterator[Path]:
        """Yield a temporary folder for a new checkpoint. After the `with` block, the folder is moved to its final
        path, and old checkpoints are deleted.

        Checkpoints of later steps are deleted too, because they would be listed as the newest. If there are any,
        they are damaged, because a run resumes from its newest complete checkpoint.

        Args:
            step: number of optimizer steps so far.
            best: the step whose checkpoint is kept regardless of its age, or None if there is no such step.

        Raises:
            DiskSpaceError: the disk is full. Earlier checkpoints are kept.
        """
        temporary = self.folder / f"{_UNFINISHED}{step}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            records = record_files(temporary, temporary)
            sync_files(temporary)  # before the list of hashes, which is the last file
            write_whole(temporary / FILES, RECORDS.dump_json(records))
            shutil.rmtree(self.at(step), ignore_errors=True)
            temporary.rename(self.at(step))
            sync_folder(self.folder)
        except Exception as error:
            full = is_full(error, self.folder)  # before the deletion frees space
            shutil.rmtree(temporary, ignore_errors=True)
            if not full:
                raise
            raise DiskSpaceError(
                f"not enough disk space in {self.folder} for the checkpoint at step {step}",
                expected="space for one more checkpoint than checkpoints.keep",
                todo=f"free up some space and run the same command again: {self._newest_kept()}",
            ) from error
        self._prune(step, best)
        if self._on_written:
            self._on_written(self.at(step))

    def newest(self) -> Path | None:
        """Return the path of the newest complete checkpoint, or None if there is none. Damaged checkpoints are
        skipped.
        """
        for folder in reversed(self._all()):
            if self._whole(folder):
                return folder
            log.warning("skipping checkpoint %s, which is damaged", folder)
        return None

    def whole(self, step: int) -> Path:
        """Return the path of the checkpoint at the given step, after checking that it is complete.

        Raises:
            IntegrityError: the checkpoint is missing or damaged.
        """
        if not self._whole(self.at(step)):
            raise IntegrityError(
                f"checkpoint {self.at(step)}, which has the lowest held-out loss, is missing or damaged",
                todo=f"remove {self.folder} and train again, or set stopping.keep_best to false",
            )
        return self.at(step)

    def at(self, step: int) -> Path:
        """Return the path of the checkpoint at the given step."""
        return self.folder / f"{PREFIX}{step:08d}"

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob(f"{PREFIX}*"))

    def _whole(self, folder: Path) -> bool:
        try:
            verify_files(folder, RECORDS.validate_json((folder / FILES).read_bytes()))
        except (OSError, ValidationError, IntegrityError):
            return False
        return True

    def _prune(self, step: int, best: int | None) -> None:
        later = [folder for folder in self._all() if folder > self.at(step)]
        old = [folder for folder in self._all() if folder not in later][: -self._keep]
        for folder in later + [folder for folder in old if best is None or folder != self.at(best)]:
            shutil.rmtree(folder)
        for unfinished in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(unfinished)

    def _newest_kept(self) -> str:
        kept = self._all()
        return f"training resumes from {kept[-1].name}" if kept else "training starts from the beginning"
