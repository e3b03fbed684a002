"""The registry publishes, finds and verifies model versions. It owns `$SVC_HOME/models`.

    models/NAME/N/manifest.json  adapter/  merged/  gptq/  heldout.jsonl  reference/

A version is published atomically. It is built in a hidden folder next to the published versions, its manifest is
written last, and renaming the folder publishes it. A folder without a manifest is not a version. A version never
changes: its files are read-only.

With an object store (`artifacts.url`), the folder is a cache. A version is first fetched from the store without the
files of its formats, which are downloaded when they are needed. Only `versions` and `names` never query the store.
"""

import logging
import os
import platform
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import numpy as np

from svc.dataset.prompt_hashes import NO_PROMPTS, TRAINED_PROMPTS_FILE, PromptHashes, read_prompt_hashes
from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample, read_tokenized
from svc.errors import DiskSpaceError, IntegrityError, NotFoundError, RegistryError, SettingsError
from svc.evaluation.results import ExampleResult, read_results
from svc.files.disk import sync_folder
from svc.files.lock import wait_for_lock
from svc.registry.files import verify_files
from svc.registry.manifest import MANIFEST_FILE, FormatRecord, Manifest, read_manifest, write_manifest
from svc.registry.objects import ObjectStore
from svc.registry.tracking import Tracking
from svc.settings.settings import Settings
from svc.version import NAME_PATTERN, NUMBER_PATTERN, Alias, Format, VersionId

log = logging.getLogger(__name__)

HELDOUT_FILE = "heldout.jsonl"
REFERENCE_FOLDER = "reference"
"""Folder with files for later comparisons: `BASE_RESULTS_FILE`, the `results_file` of each format, the
training curve, a sample of the prompts, the text embedding (`TEXT_SPACE_FILE`), and the hashes of the training
prompts."""
HELDOUT_TOKENS_FILE = "heldout_tokens.jsonl"
"""File in `REFERENCE_FOLDER` that contains the examples of `HELDOUT_FILE` as token ids, in order."""
_FETCHING = ".fetching"
"""Lock file in a model's versions folder, held while files are downloaded."""

BASE_RESULTS_FILE = "base.jsonl"
"""File in `REFERENCE_FOLDER` with the base's results on the held-out examples that the merged model answered."""


def results_file(format: Format) -> str:
    """Return the name of the file in `REFERENCE_FOLDER` that holds a format's results on the held-out examples."""
    return f"{format}.jsonl"


class Registry:
    """The registry of all versions in one home folder.

    Args:
        models: folder that contains all versions.
        tracking: MLflow store, which allocates version numbers and stores aliases.
        objects: object store that shares versions with other machines, or None if there is none.
    """

    def __init__(self, models: Path, tracking: Tracking, objects: ObjectStore | None = None) -> None:
        self.models = models
        self.tracking = tracking
        self.objects = objects

    @classmethod
    def of(cls, settings: Settings) -> "Registry":
        """Return the registry for the home folder given in the settings."""
        settings.home.mkdir(parents=True, exist_ok=True)
        objects = ObjectStore(settings.artifacts.url) if settings.artifacts.url else None
        if settings.tracking_uri:
            return cls(settings.home / "models", Tracking(settings.tracking_uri), objects)
        tracking = Tracking(f"sqlite:///{settings.home / 'mlflow.db'}", settings.home / "mlflow-artifacts")
        return cls(settings.home / "models", tracking, objects)

    def names(self) -> list[str]:
        """Return the names of all models that have at least one version."""
        return sorted({version.name for version in self.versions()})

    def versions(self, name: str | None = None) -> list[VersionId]:
        """Return the versions of one model or of all models in the home folder, sorted by name and number."""
        if name is not None and not re.fullmatch(NAME_PATTERN, name):
            return []
        folders = [path.parent for path in self.models.glob(f"{name or '*'}/*/{MANIFEST_FILE}")]
        return sorted(VersionId(f.parent.name, int(f.name)) for f in folders if re.fullmatch(NUMBER_PATTERN, f.name))

    def folder(self, version: VersionId) -> Path:
        """Return the path of a version's folder, which may not exist."""
        return self.models / version.name / str(version.number)

    def artifact(self, version: VersionId, format: Format) -> Path:
        """Return the model folder of a version in the given format, after downloading any missing files.

        Raises:
            NotFoundError: the version does not exist, or lacks the format.
            DiskSpaceError, IntegrityError, RegistryError: the files could not be downloaded from the object store.
        """
        self._fetch_format(version, format)
        return self.folder(version) / format.value

    def manifest(self, version: VersionId) -> Manifest:
        """Return a version's manifest.

        Raises:
            NotFoundError: the version does not exist; the error lists the versions that do.
            IntegrityError: the manifest cannot be read.
            DiskSpaceError, RegistryError: the version could not be fetched from the object store.
        """
        if not self._is_here(version) and self.objects is not None:
            with suppress(NotFoundError):
                self._fetch(version, self.objects)
        if not self._is_here(version):
            known = self.versions(version.name)
            names = f"a version of {', '.join(self.names()) or 'a trained model'}"
            expected = f"one of {', '.join(map(str, known))}" if known else names
            raise NotFoundError(
                f"there is no version {version}", expected=expected, todo="list the versions: svc models"
            )
        return read_manifest(self.folder(version))

    def format(self, version: VersionId, format: Format) -> FormatRecord:
        """Return a version's record for the given format.

        Raises:
            NotFoundError: the version does not exist, or lacks the format.
        """
        formats = self.manifest(version).formats
        if format not in formats:
            raise NotFoundError(f"{version} has no format {format}", expected=f"one of {', '.join(formats)}")
        return formats[format]

    def resolve(self, text: str) -> VersionId:
        """Resolve `NAME@N`, `NAME@alias` or `NAME` to a version. A bare `NAME` means the version in production, or
        the newest version if none is in production.

        Raises:
            NotFoundError: there is no such version.
        """
        name, _, suffix = text.partition("@")
        if not suffix or suffix in set(Alias):
            self.refresh(name)
        if suffix in set(Alias):
            aliased = self.tracking.alias(name, Alias(suffix)) if self.versions(name) else None
            if aliased is None:
                raise NotFoundError(f"{name} has no alias {suffix!r}", todo="list the aliases: svc models")
            return aliased
        if suffix:
            version = VersionId.parse(text)
            self.manifest(version)
            return version
        known = self.versions(name)
        if not known:
            raise NotFoundError(
                f"there is no model {text!r}",
                expected=f"one of {', '.join(self.names())}" if self.names() else "a model created with `svc train`",
            )
        return self.tracking.alias(name, Alias.PRODUCTION) or known[-1]

    def verify(self, version: VersionId, format: Format) -> None:
        """Check the files of one format against the manifest, after downloading any missing files.

        Raises:
            IntegrityError: a file is missing or was changed.
            DiskSpaceError, RegistryError: the files could not be downloaded from the object store.
        """
        self._fetch_format(version, format)
        verify_files(self.folder(version), self.format(version, format).files)

    def heldout(self, version: VersionId) -> list[ChatExample]:
        """Return all held-out examples of a version. If `evaluate.limit` was set, only that number of examples from the
        start of the file was evaluated.

        Raises:
            NotFoundError: the version does not exist.
            IntegrityError: the file is missing or was changed.
        """
        record = self.manifest(version).heldout
        verify_files(self.folder(version), [record])
        return list(read_examples(self.folder(version) / record.path))

    def reference(self, version: VersionId, file: str) -> Path:
        """Verify a version's reference file and return its path. Reference files are used for comparisons with
        later traffic and answers.

        Args:
            file: name of the file in `REFERENCE_FOLDER`.

        Raises:
            NotFoundError: the version does not exist, or lacks the file.
            IntegrityError: the file is missing or was changed.
        """
        path = f"{REFERENCE_FOLDER}/{file}"
        records = [record for record in self.manifest(version).reference if record.path == path]
        if not records:
            raise NotFoundError(f"{version} has no file {path}")
        verify_files(self.folder(version), records)
        return self.folder(version) / path

    def results(self, version: VersionId, format: Format) -> tuple[ExampleResult, ...]:
        """Return the results that were stored for a version's held-out examples at registration, in file order. They
        may cover only the first part of the file.

        Raises:
            NotFoundError: the version does not exist, or has no results in this format. Adapters never have results.
            IntegrityError: the file is missing or was changed.
        """
        if format is Format.ADAPTER:
            raise NotFoundError(
                f"{version} has stored answers to its held-out examples for its merged format, but none for its adapter"
            )
        return read_results(self.reference(version, results_file(format)))

    def base_results(self, version: VersionId) -> tuple[ExampleResult, ...]:
        """Return the base's results on a version's held-out examples, in the same order as `results`.

        Raises:
            NotFoundError: the version does not exist, or its base was not evaluated.
            IntegrityError: the file is missing or was changed.
        """
        return read_results(self.reference(version, BASE_RESULTS_FILE))

    def heldout_tokens(self, version: VersionId) -> tuple[TokenizedExample, ...]:
        """Return the same examples as `heldout`, as tokenized by the trainer.

        Raises:
            NotFoundError: the version does not exist.
            IntegrityError: the file is missing or was changed.
        """
        return read_tokenized(self.reference(version, HELDOUT_TOKENS_FILE))

    def learnt_prompts(self, name: str) -> PromptHashes:
        """Return the hashes of all prompts that any version of a model was trained on.

        A damaged version is logged and skipped, so that a new version can still be trained.
        """
        self.refresh(name)
        hashes = [NO_PROMPTS]
        for version in self.versions(name):
            try:
                hashes.append(read_prompt_hashes(self.reference(version, TRAINED_PROMPTS_FILE)))
            except NotFoundError:  # removed since it was listed
                continue
            except IntegrityError:
                log.warning(
                    "could not read the training prompts of %s; held-out examples may include some of them",
                    version,
                    exc_info=True,
                )
        return np.unique(np.concatenate(hashes))

    def refresh(self, name: str | None = None) -> None:
        """Fetch the versions of one model or of all models from the object store, without their model files.

        If the store is not responding, or a version is damaged, a warning is logged and only the versions in the home
        folder can be used.
        """
        if self.objects is None or (name is not None and not re.fullmatch(NAME_PATTERN, name)):
            return
        try:
            missing = [version for version in self.objects.versions(name) if not self._is_here(version)]
        except RegistryError as error:
            log.warning("only the versions in %s are available now: %s", self.models, error)
            return
        for version in missing:
            try:
                self._fetch(version, self.objects)
            except (NotFoundError, IntegrityError, RegistryError, DiskSpaceError) as error:
                log.warning("could not fetch %s: %s", version, error)

    def push(self, version: VersionId) -> None:
        """Upload a version from the home folder to the object store, unless the store already has it.

        Raises:
            NotFoundError: there is no such version.
            SettingsError: no object store is configured.
            IntegrityError: a file was changed.
            RegistryError: the store is not responding, rejects a request, or has a different version with this name and
                number.
        """
        if self.objects is None:
            raise SettingsError("no object store is configured", todo="set artifacts.url: docs/scale.md#object-storage")
        self.objects.upload(self.manifest(version), self.folder(version))

    def publish(
        self, name: str, run_id: str, content: dict[str, Path], manifest: Callable[[VersionId, Path], Manifest]
    ) -> Manifest:
        """Publish finished files as a new version, atomically, and return the version's manifest.

        With an object store, the version is published there first. If that fails, the version is not published in the
        home folder either, and a repeated call uploads only the files that the store still lacks.

        Args:
            name: the model's name.
            run_id: the MLflow run that created the version.
            content: source file or folder of each entry in the version's folder, keyed by the entry's name.
                Files are linked if the file system supports links, so that nothing is copied within one disk.
            manifest: function that takes the version and the folder with the content, and returns the manifest.

        Raises:
            RegistryError: the object store is not responding, or another machine has just published a version with this
                number.
        """
        parent = self.models / name
        parent.mkdir(parents=True, exist_ok=True)
        version = self.tracking.allocate(name, self._source(name), run_id)
        taken = set(self.objects.versions(name)) if self.objects else set()
        while self.folder(version).exists() or version in taken:  # unknown to MLflow; its number stays used
            version = self.tracking.allocate(name, self._source(name), run_id)
        try:
            return self._publish(version, content, manifest)
        except BaseException:
            self.tracking.discard(version)
            raise

    def publish_as(
        self, version: VersionId, content: dict[str, Path], manifest: Callable[[VersionId, Path], Manifest]
    ) -> None:
        """Publish finished files as the version with a given number, unless that version exists. The version is not
        registered in MLflow.

        Args:
            content, manifest: see `publish`.
        """
        if not self._is_here(version):
            (self.models / version.name).mkdir(parents=True, exist_ok=True)
            self._publish(version, content, manifest)

    def _publish(
        self, version: VersionId, content: dict[str, Path], manifest: Callable[[VersionId, Path], Manifest]
    ) -> Manifest:
        folder = self.folder(version)
        staging = folder.with_name(f".{version.number}")
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            for target, source in content.items():
                _link(source, staging / target)
            published = manifest(version, staging)
            write_manifest(staging, published)
            for path in staging.rglob("*"):
                if path.is_file():
                    path.chmod(0o444)
            if self.objects is not None:
                self.objects.upload(published, staging)
            staging.rename(folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        sync_folder(folder.parent)
        return published

    def downloads_paused(self, name: str) -> AbstractContextManager[None]:
        """Return a context manager that keeps other threads and processes from downloading versions of a model."""
        return wait_for_lock(self.models / name / _FETCHING)

    def _source(self, name: str) -> str:
        """Return the location of a model's versions for display in MLflow: the URL in the object store, or the folder.

        If MLflow is a server, the folder is given as a URL with this machine's name, because the server rejects folders
        on other machines.
        """
        if self.objects is not None and not self.objects.url.startswith("file:"):
            return self.objects.versions_url(name)
        folder = self.models / name
        return f"tuneserve://{platform.node()}{folder.absolute()}" if self.tracking.is_remote else str(folder)

    def _is_here(self, version: VersionId) -> bool:
        return (self.folder(version) / MANIFEST_FILE).is_file()

    def _fetch(self, version: VersionId, objects: ObjectStore) -> None:
        """Fetch a version without its model files. An interrupted fetch is resumed by the next call."""
        manifest, folder = objects.manifest(version), self.folder(version)
        staging = folder.with_name(f".fetch-{version.number}")
        with self.downloads_paused(version.name):
            if self._is_here(version):
                return
            objects.download(version.name, manifest.small_files, staging, str(version))
            verify_files(staging, manifest.small_files)  # an earlier fetch may have been for another version
            write_manifest(staging, manifest)
            (staging / MANIFEST_FILE).chmod(0o444)
            with self.tracking.if_available():
                self.tracking.adopt(version, self._source(version.name))
            staging.rename(folder)
            sync_folder(folder.parent)

    def _fetch_format(self, version: VersionId, format: Format) -> None:
        """Download a format's files that are missing from the home folder, and mark the format as used."""
        files, folder = self.format(version, format).files, self.folder(version)
        if self.objects is None:
            return
        if not all((folder / file.path).is_file() for file in files):
            with self.downloads_paused(version.name):
                self.objects.download(version.name, files, folder, str(version))
        os.utime(folder / format)


def _link(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_file)
    else:
        _link_file(str(source), str(target))


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
