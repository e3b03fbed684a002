"""Model folders on a machine of the cluster: downloaded from the artifact store, and verified before each use.

FOLDER/models/NAME/N/manifest.json  adapter/  merged/  gptq/
FOLDER/models/NAME/.in-use-N-FORMAT    locked by each actor whose engine may read the model folder
"""

import logging
import os
import shutil
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

from serving.engines.ray.link import ModelFiles
from svc.errors import NotFoundError
from svc.files.lock import locked_file, share_lock, wait_for_lock
from svc.registry.files import verify_files
from svc.registry.objects import ObjectStore
from svc.version import Format

log = logging.getLogger(__name__)

_FETCHING = ".fetching"
_MODELS = "models"
_KEPT = 2
"""Number of folders with complete weights that are kept for an engine: those of its current version and of the version
that replaces it."""


class NodeModels:
    """The model folders on this machine that one engine uses. Several engines may share a folder.

    Args:
        folder: folder with all versions on this machine.

    Attributes:
        max_bytes: size limit for all versions, in bytes, or None for no limit. If it is exceeded before a download,
            model folders that no engine uses are removed, least recently used first.
    """

    def __init__(self, folder: Path) -> None:
        self._models = folder / _MODELS
        self.max_bytes: float | None = None
        self._used = dict[Path, ExitStack]()  # the most recently used is the last
        self._turn = threading.Lock()

    def fetch(self, model: ModelFiles) -> Path:
        """Return the path of a model folder on this machine, after downloading missing files and verifying all of them.

        Raises:
            NotFoundError: the artifact store does not have the version; or the folder does not belong to a version and
                is missing on this machine.
            DiskSpaceError, IntegrityError, RegistryError: the files could not be downloaded, or were changed.
        """
        if model.target is None:
            if not (model.path / "config.json").is_file():
                raise NotFoundError(
                    f"{model.path} contains no model",
                    expected="the adapter's base model, at the same path as on the server",
                    todo="mount the base model's folder at this path, or serve the version with --format merged",
                )
            return model.path
        version, format = model.target.version, model.target.format
        place = self._models / version.name / str(version.number)
        objects = ObjectStore(model.artifacts)
        try:
            manifest = objects.manifest(version)
        except NotFoundError as error:
            raise NotFoundError(error.wrong, todo=f"upload it: svc models push {version}") from error
        files, target = manifest.formats[format].files, place / format
        with self._turn:
            self._use(target)
            with wait_for_lock(place.parent / _FETCHING):
                missing = sum(file.bytes for file in files if not (place / file.path).is_file())
                if missing and self.max_bytes is not None:
                    evict(self._models, self.max_bytes - missing)
                objects.download(version.name, files, place, str(version))
            verify_files(place, files)
            os.utime(target)
            self._release()
        return target

    def close(self) -> None:
        """Release all model folders, so that they can be evicted."""
        for used in self._used.values():
            used.close()
        self._used.clear()

    def _use(self, target: Path) -> None:
        """Protect a model folder from eviction, waiting until an eviction in progress has ended."""
        used = self._used.pop(target, None)
        if used is None:
            used = ExitStack()
            used.enter_context(share_lock(_use_lock(target)))
        self._used[target] = used

    def _release(self) -> None:
        """Stop using the model folders that were replaced. Adapters are kept, because vLLM may read them again."""
        weights = [target for target in self._used if target.name != Format.ADAPTER]
        for target in weights[:-_KEPT]:
            self._used.pop(target).close()


def evict(models: Path, max_bytes: float) -> None:
    """Remove model folders that no engine on this machine uses, least recently used first, until the remaining folders
    take up at most `max_bytes`.

    Args:
        models: folder with the versions of all models.
    """
    folders = [path for path in models.glob("*/*/*") if path.is_dir() and path.name in set(Format)]
    sizes = {folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in folders}
    excess = sum(sizes.values()) - max_bytes
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime):
        if excess <= 0:
            return
        with suppress(BlockingIOError), locked_file(_use_lock(folder)):
            hidden = folder.with_name(f".removed-{folder.name}")
            shutil.rmtree(hidden, ignore_errors=True)  # of an interrupted eviction
            folder.rename(hidden)  # a partly removed folder is never used
            shutil.rmtree(hidden)
            log.info("removed %s, which no engine uses, to free disk space for another version", folder)
            excess -= sizes[folder]


def _use_lock(target: Path) -> Path:
    """Return the lock file of a model folder, `models/NAME/N/FORMAT`."""
    return target.parent.parent / f".in-use-{target.parent.name}-{target.name}"
