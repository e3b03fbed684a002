"""The manifest: what a version is, beside its weights, written once and last."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from svc.engine.probes import MAX_PROBES, Probe
from svc.errors import IntegrityError
from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.finding import Finding
from svc.evaluation.forgetting import Forgetting
from svc.evaluation.judge import JudgeReport
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
        origin: what the recipe said.
        revision: what pins its content.
        licence: as its publisher states it; None when unknown.
    """

    origin: str
    revision: str
    licence: str | None


class DataRecord(_Record):
    """What was trained on and judged by."""

    train_fingerprint: str
    train_examples: int
    heldout_fingerprint: str
    heldout_examples: int


class FormatRecord(_Record):
    """The version in one format.

    Attributes:
        fingerprint: versions with the same one can replace each other in a running engine.
        evaluation: on the engine; None for a format that was not served.
        load_seconds: reload in place into a running engine.
        tokens_per_second: decoded, over 8 streams.
    """

    files: tuple[FileRecord, ...]
    fingerprint: str | None = None
    evaluation: EvaluationReport | None = None
    probes: tuple[Probe, ...] = Field((), max_length=MAX_PROBES)
    load_seconds: float | None = None
    tokens_per_second: float | None = None

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(file.bytes for file in self.files)


class Manifest(_Record):
    """All that is known of a version. Training figures are in MLflow under `tracking_run`.

    Attributes:
        reference: the files that later traffic and answers are compared with.
        base_evaluation: None where the base was not asked: it is compared with the merged model alone.
        failed: checks that the version failed; one that has any was registered on request, and cannot be promoted.
        parity: that what was trained is what is served; None where no format is served.
        judge: what a judge says of the merged model beside the base; None where none was named.
        findings: what is wrong with its training.
        forgetting: None where no general questions were asked.
        gates: verdicts on what quantizing and training cost; empty where nothing limits that.
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
    forgetting: Forgetting | None
    gates: tuple[GateReport, ...] = ()

    @property
    def id(self) -> VersionId:
        """The version's name."""
        return VersionId(self.name, self.number)

    @property
    def undecided(self) -> tuple[str, ...]:
        """The gates for which the examples were too few, each as a sentence; without those that count as failed."""
        undecided = (str(gate) for gate in self.gates if gate.verdict.outcome is GateOutcome.UNDECIDED)
        return tuple(gate for gate in undecided if gate not in self.failed)

    @property
    def judged_examples(self) -> int:
        """By how many held-out examples its formats were judged; 0 of an adapter alone."""
        return next((record.evaluation.examples for record in self.formats.values() if record.evaluation), 0)

    @property
    def primary_title(self) -> str:
        """The metric that it was judged by first of all; empty of an adapter alone."""
        report = next((record.evaluation for record in self.formats.values() if record.evaluation), None)
        return report.figures[report.primary].title if report else ""

    @property
    def max_answer_tokens(self) -> int | None:
        """The recipe's limit on answers to held-out examples, tokens; None: by each reference."""
        found: int | None = self.recipe.get("evaluate", {}).get("max_tokens")
        return found


def read_manifest(folder: Path) -> Manifest:
    """Reads a version's manifest.

    Raises:
        IntegrityError: it is missing, or is no manifest, or is another version's.
    """
    path = folder / MANIFEST_FILE
    manifest = read_record(path, Manifest)
    if (manifest.name, str(manifest.number)) != (folder.parent.name, folder.name):
        raise IntegrityError(f"{path} is the manifest of {manifest.id}", expected=f"{folder.parent.name}@{folder.name}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes it whole or not at all."""
    content = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False)
    write_whole(folder / MANIFEST_FILE, content.encode("utf-8"))
