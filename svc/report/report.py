"""All that a version keeps of itself, gathered for one page. Knows nothing of how it is shown."""

from collections import Counter
from dataclasses import dataclass

from svc.dataset.summary import DATA_SUMMARY_FILE, DataSummary, read_data_summary
from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.metrics.label import label_of
from svc.evaluation.results import ExampleResult
from svc.evaluation.training_curve import TRAINING_CURVE_FILE, TrainingPoint, read_training_curve
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.registry.run_record import RUN_RECORD_FILE, RunRecord, read_run_record
from svc.report.confusion import ConfusionMatrix, confusion_matrix
from svc.report.judged import BASE, Judged, MetricRow, Verdict
from svc.report.shown_example import ShownExample, lost_examples, side_by_side, worst_examples
from svc.version import Format, VersionId


@dataclass(frozen=True, slots=True)
class Report:
    """The report.

    Attributes:
        tuned: the format that stands for the version; None where none was judged.
        models: that were judged, the base first.
        metrics: the primary one first.
        confusion: of `tuned`; None where answers are no labels.
        worst, lost, side_by_side: examples, see `svc.report.shown_example`.
        heldout_labels: how often each label stands in the held-out examples, where `data` has labels.
    """

    manifest: Manifest
    tuned: str | None
    models: tuple[str, ...]
    metrics: tuple[MetricRow, ...]
    verdicts: tuple[Verdict, ...]
    confusion: ConfusionMatrix | None
    curve: tuple[TrainingPoint, ...]
    worst: tuple[ShownExample, ...]
    lost: tuple[ShownExample, ...]
    side_by_side: tuple[ShownExample, ...]
    data: DataSummary
    heldout_labels: dict[str, int]
    run: RunRecord


def gather_report(registry: Registry, version: VersionId) -> Report:
    """Reads what a version keeps.

    Raises:
        NotFoundError: no such version.
        IntegrityError: a file of it is missing or was changed.
    """
    manifest = registry.manifest(version)
    judged = _judged(registry, manifest)
    rows = judged.rows()
    answered = judged.results.get(judged.tuned or "", ())
    data = read_data_summary(registry.reference(version, DATA_SUMMARY_FILE))
    return Report(
        manifest=manifest,
        tuned=judged.tuned,
        models=tuple(judged.evaluations),
        metrics=rows,
        verdicts=judged.verdicts(),
        confusion=confusion_matrix(judged.examples, answered) if answered else None,
        curve=read_training_curve(registry.reference(version, TRAINING_CURVE_FILE)),
        worst=worst_examples(judged, rows[0].better) if rows else (),
        lost=lost_examples(judged, rows[0].better) if rows else (),
        side_by_side=side_by_side(judged),
        data=data,
        heldout_labels=_labels(registry, version) if data.labels else {},
        run=read_run_record(registry.reference(version, RUN_RECORD_FILE)),
    )


def _judged(registry: Registry, manifest: Manifest) -> Judged:
    evaluations: dict[str, EvaluationReport] = {}
    results: dict[str, tuple[ExampleResult, ...]] = {}
    if manifest.base_evaluation:
        evaluations[BASE] = manifest.base_evaluation
        results[BASE] = registry.base_results(manifest.id)
    for format in (Format.MERGED, Format.GPTQ):
        record = manifest.formats.get(format)
        if record and record.evaluation:
            evaluations[format] = record.evaluation
            results[format] = registry.results(manifest.id, format)
    examples = registry.heldout(manifest.id)[: manifest.judged_examples]
    return Judged(examples, evaluations, results)


def _labels(registry: Registry, version: VersionId) -> dict[str, int]:
    return dict(Counter(label_of(example.answer) for example in registry.heldout(version)))
