"""Model folders on a machine of the cluster: downloaded from the artifact store, and verified before each use.

FOLDER/models/NAME/N/manifest.json  adapter/  merged/  gptq/
"""

from pathlib import Path

from svc.errors import NotFoundError
from svc.files.lock import wait_for_lock
from svc.ray_engine.messages import ModelFiles
from svc.registry.files import verify_files
from svc.registry.objects import ObjectStore
from svc.version import VersionId

_FETCHING = ".fetching"
_MODELS = "models"


def fetch_model(folder: Path, artifacts: str, model: ModelFiles) -> Path:
    """Return the path of a model folder on this machine, after downloading missing files and verifying all of them.

    Args:
        folder: folder with all versions on this machine.
        artifacts: URL of the artifact store.

    Raises:
        NotFoundError: the artifact store does not have the version, or this machine lacks the folder.
        DiskSpaceError, IntegrityError, RegistryError: the files could not be downloaded, or were changed.
    """
    if model.version is None or model.format is None:
        if not (model.path / "config.json").is_file():
            raise NotFoundError(
                f"{model.path} contains no model",
                expected="the base of an adapter, at the same path as on the server's machine",
                todo="mount its folder at this path, or serve the version with --format merged",
            )
        return model.path
    version = VersionId(*model.version)
    place = folder / _MODELS / version.name / str(version.number)
    place.mkdir(parents=True, exist_ok=True)
    objects = ObjectStore(artifacts)
    try:
        manifest = objects.manifest(version)
    except NotFoundError as error:
        raise NotFoundError(error.wrong, todo=f"upload it: svc models push {version}") from error
    files = manifest.formats[model.format].files
    with wait_for_lock(place.parent / _FETCHING):
        objects.download(manifest, files, place)
    verify_files(place, files)
    return place / model.format.value


def files_of(models: Path, folder: Path) -> ModelFiles:
    """Return the values that identify a model folder on every machine.

    Args:
        models: the registry's folder, `models/NAME/N/FORMAT`.
    """
    from svc.version import Format

    if folder.is_relative_to(models):
        name, number, format = folder.relative_to(models).parts
        return ModelFiles(version=(name, int(number)), format=Format(format), path=folder)
    return ModelFiles(version=None, format=None, path=folder)
