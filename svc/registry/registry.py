"""The registry publishes, finds and verifies model versions. It owns `$SVC_HOME/models`.

    models/NAME/N/manifest.json  adapter/  merged/  gptq/  heldout.jsonl  reference/

A version is published atomically. It is built in a hidden folder next to the published ones, its
manifest is written last, and a rename publishes it. A folder without a manifest is not a version. A
version never changes: its files are read-only.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from svc.dataset.prompt_hashes import NO_PROMPTS, TRAINED_PROMPTS_FILE, PromptHashes, read_prompt_hashes
from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample, read_tokenized
from svc.errors import IntegrityError, NotFoundError
from svc.evaluation.results import ExampleResult, read_results
from svc.files.disk import sync_folder
from svc.registry.files import verify_files
from svc.registry.manifest import MANIFEST_FILE, FormatRecord, Manifest, read_manifest, write_manifest
from svc.registry.tracking import Tracking
from svc.settings import Settings
from svc.version import NAME_PATTERN, NUMBER_PATTERN, Alias, Format, VersionId

log = logging.getLogger(__name__)

HELDOUT_FILE = "heldout.jsonl"
REFERENCE_FOLDER = "reference"
"""Folder with files for later comparisons: `BASE_RESULTS_FILE`, the `results_file` of each format, the
training curve, a sample of the prompts, the text space, and the hashes of the training prompts."""
HELDOUT_TOKENS_FILE = "heldout_tokens.jsonl"
"""File in `REFERENCE_FOLDER` that contains the examples of `HELDOUT_FILE` as token ids, in order."""


BASE_RESULTS_FILE = "base.jsonl"
"""File in `REFERENCE_FOLDER` with the base's results on the held-out examples that the merged model answered."""


def results_file(format: Format) -> str:
    """Return the name of the file in `REFERENCE_FOLDER` with a format's results on the held-out examples."""
    return f"{format}.jsonl"


class Registry:
    """The registry of all versions in one home folder.

    Args:
        models: folder that contains all versions.
        tracking: MLflow store, which allocates version numbers and stores aliases.
    """

    def __init__(self, models: Path, tracking: Tracking) -> None:
        self.models = models
        self.tracking = tracking

    @classmethod
    def of(cls, settings: Settings) -> "Registry":
        """Return the registry for the home folder given in the settings."""
        settings.home.mkdir(parents=True, exist_ok=True)
        if settings.tracking_uri:
            return cls(settings.home / "models", Tracking(settings.tracking_uri))
        tracking = Tracking(f"sqlite:///{settings.home / 'mlflow.db'}", settings.home / "mlflow-artifacts")
        return cls(settings.home / "models", tracking)

    def names(self) -> list[str]:
        """Return the names of all models that have at least one version."""
        return sorted({version.name for version in self.versions()})

    def versions(self, name: str | None = None) -> list[VersionId]:
        """Return all versions, or only those of one model, sorted by name and number."""
        if name is not None and not re.fullmatch(NAME_PATTERN, name):
            return []
        folders = [path.parent for path in self.models.glob(f"{name or '*'}/*/{MANIFEST_FILE}")]
        return sorted(VersionId(f.parent.name, int(f.name)) for f in folders if re.fullmatch(NUMBER_PATTERN, f.name))

    def folder(self, version: VersionId) -> Path:
        """Return the path of a version's folder, which may not exist."""
        return self.models / version.name / str(version.number)

    def artifact(self, version: VersionId, format: Format) -> Path:
        """Return the model folder of a version in the given format.

        Raises:
            NotFoundError: the version, or its format, does not exist.
        """
        self.format(version, format)
        return self.folder(version) / format.value

    def manifest(self, version: VersionId) -> Manifest:
        """Return a version's manifest.

        Raises:
            NotFoundError: the version does not exist; the error lists the versions that do.
            IntegrityError: the manifest cannot be read.
        """
        if not (self.folder(version) / MANIFEST_FILE).is_file():
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
            NotFoundError: the version, or its format, does not exist.
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
        """Check the files of one format against the manifest.

        Raises:
            IntegrityError: a file is missing or was changed.
        """
        verify_files(self.folder(version), self.format(version, format).files)

    def heldout(self, version: VersionId) -> list[ChatExample]:
        """Return all held-out examples of a version. If `evaluate.limit` was set, only the first ones were
        evaluated.

        Raises:
            NotFoundError: the version does not exist.
            IntegrityError: the file is missing or was changed.
        """
        record = self.manifest(version).heldout
        verify_files(self.folder(version), [record])
        return read_examples(self.folder(version) / record.path)

    def reference(self, version: VersionId, file: str) -> Path:
        """Verify a version's reference file and return its path. Reference files are used for comparisons with
        later traffic and answers.

        Args:
            file: name of the file in `REFERENCE_FOLDER`.

        Raises:
            NotFoundError: the version, or its file, does not exist.
            IntegrityError: the file is missing or was changed.
        """
        path = f"{REFERENCE_FOLDER}/{file}"
        records = [record for record in self.manifest(version).reference if record.path == path]
        if not records:
            raise NotFoundError(f"{version} has no file {path}")
        verify_files(self.folder(version), records)
        return self.folder(version) / path

    def results(self, version: VersionId, format: Format) -> tuple[ExampleResult, ...]:
        """Return a version's held-out results from registration, in file order. They may cover only the first
        examples.

        Raises:
            NotFoundError: the version does not exist, or has no results in this format, as is the case for an
                adapter.
            IntegrityError: the file is missing or was changed.
        """
        if format is Format.ADAPTER:
            raise NotFoundError(f"{version} has registered answers for its merged format, but none for its adapter")
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

    def publish(
        self, name: str, run_id: str, content: dict[str, Path], manifest: Callable[[VersionId, Path], Manifest]
    ) -> Manifest:
        """Publish finished files as a new version, atomically, and return the version's manifest.

        Args:
            name: the model's name.
            run_id: the MLflow run that created the version.
            content: source file or folder of each entry in the version's folder, keyed by the entry's name.
                Files are linked if the file system supports links, so that nothing is copied within one disk.
            manifest: called with the version and the folder that contains the content; returns the manifest.
        """
        parent = self.models / name
        parent.mkdir(parents=True, exist_ok=True)
        version = self.tracking.allocate(name, source=str(parent), run_id=run_id)
        while self.folder(version).exists():  # a folder unknown to MLflow; its number stays used
            version = self.tracking.allocate(name, source=str(parent), run_id=run_id)
        staging = parent / f".{version.number}"
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
            staging.rename(self.folder(version))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            self.tracking.discard(version)
            raise
        sync_folder(parent)
        return published


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
