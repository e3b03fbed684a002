"""A version's manifest, which records all facts about the version. The manifest is written once, after all other
files."""

import json
from datetime import datetime
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from svc.engine.probes import MAX_PROBES, Probe
from svc.errors import IntegrityError
from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.finding import Finding
from svc.evaluation.forgetting import Forgetting
from svc.evaluation.judge import JudgeReport
from svc.evaluation.preference import PreferenceReport
from svc.evaluation.verdict import GateOutcome, GateReport
from svc.files.disk import write_whole
from svc.files.json_file import read_record
from svc.registry.files import FileRecord
from svc.registry.parity import ParityReport
from svc.version import NAME_PATTERN, Format, VersionId

MANIFEST_FILE = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseRecord(_Record):
    """The model that was fine-tuned.

    Attributes:
        origin: name of the base in the recipe.
        revision: revision that identifies the base's exact files.
        licence: license stated by the publisher, or None if unknown.
    """

    origin: str
    revision: str
    licence: str | None


class SelectedBy(StrEnum):
    """Examples that were used to select a version's weights (in early stopping) or its recipe's values (in a sweep)."""

    NONE = "none"
    HELDOUT = "heldout"
    VALIDATION = "validation"


class DataRecord(_Record):
    """The examples used for training and evaluation.

    Attributes:
        modified_at: time (UTC) at which the newest local training file was last modified, or None if unknown.
        pairs_fingerprint: fingerprint of the held-out pairs, or None if there are none. For preference training,
            `train_fingerprint` refers to the training pairs or labeled answers.
    """

    train_fingerprint: str
    train_examples: int
    heldout_fingerprint: str
    heldout_examples: int
    validation_examples: int = 0
    selected_by: SelectedBy = SelectedBy.NONE
    modified_at: datetime | None = None
    pairs_fingerprint: str | None = None

    @property
    def selection(self) -> str:
        """Note on the examples that were used to select the version, and on how the selection affects its metrics.
        Empty if no examples were used for selection.
        """
        if self.selected_by is SelectedBy.HELDOUT:
            return "these examples selected the version, so its results are slightly too good (set data.validation)"
        if self.selected_by is SelectedBy.VALIDATION:
            return f"the version was selected on {self.validation_examples} other examples (data.validation)"
        return ""


class FormatRecord(_Record):
    """Record of one format in a version's manifest.

    Attributes:
        fingerprint: fingerprint of the format; versions with equal fingerprints can replace each other in a
            running engine.
        evaluation: quality measured on the engine, or None for a format that was not served.
        load_seconds: time to load the weights into a running engine, in seconds.
        tokens_per_second: tokens decoded per second with 8 concurrent streams.
        preference: preference accuracy on held-out pairs, or None if there are no pairs.
    """

    files: tuple[FileRecord, ...]
    fingerprint: str | None = None
    evaluation: EvaluationReport | None = None
    probes: tuple[Probe, ...] = Field((), max_length=MAX_PROBES)
    load_seconds: float | None = None
    tokens_per_second: float | None = None
    preference: PreferenceReport | None = None

    @property
    def bytes(self) -> int:
        """Size on disk, in bytes."""
        return sum(file.bytes for file in self.files)


class Manifest(_Record):
    """All recorded facts about a version. Training metrics are in MLflow under `tracking_run`.

    Attributes:
        reference: records of the files with which later traffic and answers are compared.
        base_evaluation: quality of the base, for comparison with the merged model; None if not evaluated.
        failed: checks that the version failed. Such a version is registered only if the user asks for it, and cannot
            be promoted.
        parity: comparison of the trained model with the served one, or None if no format is served.
        judge: a judge's comparison of the merged model with the base, or None if there was no judge.
        findings: problems found in the training run.
        forgetting: loss of general knowledge in each format compared with the base; empty if no general
            questions were asked.
        gates: verdicts on the losses caused by quantization and training; empty if the recipe sets no
            limits.
        base_preference: the base's preference accuracy on held-out pairs, or None if not measured.
    """

    schema_version: Literal[1] = 1
    name: str = Field(pattern=NAME_PATTERN)
    number: int = Field(ge=1)
    created_at: datetime
    run: str
    tracking_run: str
    base: BaseRecord
    recipe: dict[str, Any]
    data: DataRecord
    heldout: FileRecord
    reference: tuple[FileRecord, ...]
    base_evaluation: EvaluationReport | None
    formats: dict[Format, FormatRecord]
    libraries: dict[str, str]
    failed: tuple[str, ...]
    parity: ParityReport | None
    judge: JudgeReport | None
    findings: tuple[Finding, ...]
    forgetting: dict[Format, Forgetting]
    gates: tuple[GateReport, ...] = ()
    base_preference: PreferenceReport | None = None

    @property
    def id(self) -> VersionId:
        """The version's id, `NAME@N`."""
        return VersionId(self.name, self.number)

    @property
    def small_files(self) -> tuple[FileRecord, ...]:
        """Records of the files that are not specific to a format: the held-out examples and the reference files."""
        return (self.heldout, *self.reference)

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Records of all files except the manifest."""
        return (*self.small_files, *(file for record in self.formats.values() for file in record.files))

    @property
    def undecided(self) -> tuple[str, ...]:
        """Descriptions of the undecided gates, except gates that count as failed."""
        undecided = (str(gate) for gate in self.gates if gate.verdict.outcome is GateOutcome.UNDECIDED)
        return tuple(gate for gate in undecided if gate not in self.failed)

    @property
    def judged_examples(self) -> int:
        """Number of held-out examples on which the version's formats were evaluated; 0 if it has only an adapter."""
        return next((record.evaluation.examples for record in self.formats.values() if record.evaluation), 0)

    @property
    def imported_adapter(self) -> str | None:
        """Folder or Hub id of the imported adapter, or None if the adapter was trained here."""
        adapter: str | None = self.recipe.get("adapter", {}).get("trained")
        return adapter

    @property
    def adapter_origin(self) -> str | None:
        """Description of the adapter's origin, or None if the adapter was trained here."""
        if self.imported_adapter:
            return f"the adapter {self.imported_adapter}, trained elsewhere"
        combine = self.recipe.get("adapter", {}).get("combine")
        if not combine:
            return None
        parts = ", ".join(f"{part['adapter']} ({part['weight']:g})" for part in combine["adapters"])
        return f"adapters combined by {combine['method']}: {parts}"

    @property
    def preferences(self) -> dict[str, PreferenceReport]:
        """Preference accuracy of the base and of each format on held-out pairs; empty if there are no pairs."""
        reports = {"base": self.base_preference} | {
            format.value: record.preference for format, record in self.formats.items()
        }
        return {name: report for name, report in reports.items() if report}

    @property
    def primary_title(self) -> str:
        """Title of the primary metric; empty if the version has only an adapter."""
        report = next((record.evaluation for record in self.formats.values() if record.evaluation), None)
        return report.figures[report.primary].title if report else ""

    @property
    def max_answer_tokens(self) -> int | None:
        """The recipe's token limit for held-out answers, or None if each answer's limit depends on its reference
        answer.
        """
        limit: int | None = self.recipe.get("evaluate", {}).get("max_tokens")
        return limit


def read_manifest(folder: Path) -> Manifest:
    """Read a version's manifest.

    Raises:
        IntegrityError: the file is missing, is not a manifest, or belongs to a different version.
    """
    path = folder / MANIFEST_FILE
    manifest = read_record(path, Manifest)
    if (manifest.name, str(manifest.number)) != (folder.parent.name, folder.name):
        own = f"{folder.parent.name}@{folder.name}"
        raise IntegrityError(f"{path} is the manifest of {manifest.id}, not of {own}", expected=own)
    return manifest


def parse_manifest(content: bytes, version: VersionId, source: str) -> Manifest:
    """Parse a version's manifest that was not read from the registry's own folder.

    Args:
        source: location of the manifest, for error messages.

    Raises:
        IntegrityError: the bytes are not a manifest, or belong to a different version.
    """
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(
            f"{source} is not a manifest that this release can read: {where}: {first['msg']}",
            todo="if a newer release wrote the manifest, upgrade tuneserve on this machine; otherwise "
            "restore the manifest from a backup",
        ) from error
    if manifest.id != version:
        raise IntegrityError(f"{source} is the manifest of {manifest.id}, not of {version}", expected=str(version))
    for path in (PurePosixPath(file.path) for file in manifest.files):
        if path.is_absolute() or ".." in path.parts:
            raise IntegrityError(f"{source} names a file outside the version's folder: {path}")
    return manifest


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the serialized manifest, exactly as stored in its file."""
    return json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False).encode("utf-8")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest atomically."""
    write_whole(folder / MANIFEST_FILE, manifest_bytes(manifest))
