"""Shares the checkpoints of an unfinished training run with other machines, through the object store.

    checkpoints/RUN/mlflow.json          id of the MLflow run
    checkpoints/RUN/step-00000120.json   size and SHA-256 of each file; written last, to mark the checkpoint complete
    checkpoints/RUN/step-00000120/FILE
    checkpoints/RUN/trained/FILE         the trained model, if another machine needs it for the next stages

RUN identifies everything that determines the result. Machines that train the same recipe therefore share a run, and a
machine can continue a run whose original machine is gone. The store contains the checkpoints of the machine that
trained last.
"""

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from svc.errors import IntegrityError, RegistryError
from svc.files.disk import write_whole
from svc.registry.files import FileRecord, record_files
from svc.registry.objects import ObjectStore
from trainer.training.checkpoints import FILES, PREFIX, RECORDS
from trainer.training.parallel.shared_folders import fetch_files, fetch_folder, send_folder

_TRAINED = "trained"

log = logging.getLogger(__name__)


class SharedCheckpoints:
    """One run's checkpoints, both in the object store and on this machine.

    Args:
        run: name of the run.
        folder: folder of the run's checkpoints on this machine.
        tracking: file with the id of the MLflow run.
    """

    def __init__(self, objects: ObjectStore, run: str, folder: Path, tracking: Path) -> None:
        self._objects = objects
        self._prefix = f"checkpoints/{run}"
        self._folder = folder
        self._tracking = tracking

    def fetch(self) -> str | None:
        """Download the store's checkpoints if the newest of them is newer than this machine's newest checkpoint.

        Returns:
            The name of the newest checkpoint, or None if nothing was downloaded.

        Raises:
            IntegrityError: an object is missing, truncated or altered.
            RegistryError: the store is not responding, or rejects the request.
        """
        shared = self._shared()
        if not shared or ((here := self._here()) and here[-1] >= shared[-1]):
            return None
        for step in shared:
            if step not in here:
                fetch_folder(self._objects, f"{self._prefix}/{step}", self._folder / step, FILES)
        self.fetch_tracking()
        return shared[-1]

    def fetch_tracking(self) -> None:
        """Adopt the id of the MLflow run that another machine started, unless this machine already has an id.

        Raises:
            RegistryError: the store is not responding, or rejects the request.
        """
        if not self._tracking.is_file() and (content := self._objects.read(f"{self._prefix}/mlflow.json")):
            write_whole(self._tracking, content)

    def send_newest(self) -> None:
        """Upload this machine's newest checkpoint if it is newer than every checkpoint in the store."""
        here, shared = self._here(), self._shared()
        if here and (not shared or here[-1] > shared[-1]):
            self.send(self._folder / here[-1])

    def send(self, checkpoint: Path) -> None:
        """Upload a new checkpoint and any earlier checkpoints that the store lacks, then delete from the store all
        checkpoints that no longer exist on this machine. If the store fails, training continues, and the next call
        uploads what is missing.
        """
        try:
            shared, here = self._shared(), self._here()
            self._objects.write(f"{self._prefix}/mlflow.json", self._tracking.read_bytes())
            for step in here:  # the newest one last: it may need the best one
                if step not in shared or step == checkpoint.name:
                    self._send(self._folder / step)
            self._delete([step for step in shared if step not in here])
        except RegistryError as error:
            log.warning(
                "checkpoint %s could not be uploaded and exists only on this machine: %s", checkpoint.name, error.wrong
            )

    def send_trained(self, folder: Path) -> tuple[FileRecord, ...]:
        """Upload the trained model, and return the records of its files.

        Raises:
            RegistryError: the store is not responding, or rejects the request.
        """
        records = record_files(folder, folder)
        self._objects.send(f"{self._prefix}/{_TRAINED}", records, folder)
        return records

    def fetch_trained(self, records: Sequence[FileRecord], folder: Path) -> None:
        """Download the trained model to a folder, replacing its contents.

        Args:
            records: records of the trained model's files, as returned by `send_trained`.

        Raises:
            IntegrityError: an object is missing, truncated or altered.
            RegistryError: the store is not responding, or rejects the request.
        """
        shutil.rmtree(folder, ignore_errors=True)
        fetch_files(self._objects, f"{self._prefix}/{_TRAINED}", records, folder)

    def has_trained(self, records: Sequence[FileRecord]) -> bool:
        """Return whether the store contains all of the trained model's files in their recorded sizes.

        Args:
            records: records of the trained model's files, as returned by `send_trained`.

        Raises:
            RegistryError: the store is not responding, or rejects the request.
        """
        prefix = f"{self._prefix}/{_TRAINED}"
        return all(self._objects.size(f"{prefix}/{file.path}") == file.bytes for file in records)

    def remove(self) -> None:
        """Delete the run's objects from the store. Call this once the run's version is registered. If the store fails,
        the objects remain.
        """
        try:
            self._delete(self._shared())
            self._objects.delete(self._objects.keys(self._prefix))
        except RegistryError as error:
            log.warning("could not delete %s/ in the object store: %s", self._prefix, error.wrong)

    def _send(self, checkpoint: Path) -> None:
        try:
            records = RECORDS.validate_json((checkpoint / FILES).read_bytes())
            send_folder(self._objects, f"{self._prefix}/{checkpoint.name}", records, checkpoint)
        except (OSError, ValidationError, IntegrityError) as error:
            log.warning("checkpoint %s is damaged and was not uploaded: %s", checkpoint.name, error)

    def _delete(self, steps: list[str]) -> None:
        self._objects.delete([f"{self._prefix}/{step}.json" for step in steps])  # first, so that none is incomplete
        for step in steps:
            self._objects.delete(self._objects.keys(f"{self._prefix}/{step}"))

    def _shared(self) -> list[str]:
        keys = self._objects.keys(self._prefix)
        pattern = re.compile(rf"{re.escape(self._prefix)}/({PREFIX}\d{{8}})\.json")
        return sorted(found[1] for key in keys if (found := pattern.fullmatch(key)))

    def _here(self) -> list[str]:
        return sorted(path.name for path in self._folder.glob(f"{PREFIX}*"))
