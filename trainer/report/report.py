"""Gathers the data for a version's one-page report. This module does not know how the data is displayed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_jsonable_python
from sqlalchemy import Engine as Store

from svc.dataset.schema.example import ChatExample
from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.metrics.choose import Task, find_task
from svc.evaluation.metrics.labels import label_of
from svc.evaluation.results import ExampleResult
from svc.files.json_file import read_record
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.store.rollouts import RolloutView, read_rollouts
from svc.version import SERVED_FORMATS, VersionId
from trainer.data.summary import DATA_SUMMARY_FILE, DataSummary, read_data_summary
from trainer.model.run_record import RUN_RECORD_FILE, RunRecord
from trainer.report.judged import BASE, Judged
from trainer.training_curve import TRAINING_CURVE_FILE, TrainingPoint, read_training_curve

_MAX_LABELS = 25
_OTHERS = "(other labels)"
_NONE = "(no label)"


@dataclass(frozen=True, slots=True)
class ConfusionMatrix:
    """Number of examples for each combination of reference label and answer label.

    Attributes:
        labels: labels of the reference answers, one per row; if there are more than 25, the rarest labels share the
            last row.
        given: labels of the model's answers, one per column: the same labels, then a column for all other answers, if
            there are any.
        counts: number of examples, by row and column.
    """

    labels: tuple[str, ...]
    given: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


def confusion_matrix(examples: Sequence[ChatExample], results: Sequence[ExampleResult]) -> ConfusionMatrix | None:
    """Return the confusion matrix, or None if the references are not labels.

    Args:
        results: one result per example, in order.
    """
    if not results or find_task(examples) is not Task.LABELS:
        return None
    frequency = Counter(label_of(example.answer) for example in examples)
    labels = sorted(label for label, _ in frequency.most_common(_MAX_LABELS))
    if len(frequency) > len(labels):
        labels.append(_OTHERS)
    place = {label: labels.index(label if label in labels else _OTHERS) for label in frequency}
    counts = [[0] * (len(labels) + 1) for _ in labels]
    for example, result in zip(examples, results, strict=True):
        counts[place[label_of(example.answer)]][place.get(label_of(result.answer), len(labels))] += 1
    width = len(labels) + any(row[-1] for row in counts)
    return ConfusionMatrix(tuple(labels), (*labels, _NONE)[:width], tuple(tuple(row[:width]) for row in counts))


@dataclass(frozen=True, slots=True)
class Report:
    """The data for a version's report.

    Attributes:
        confusion: confusion matrix of the format that represents the version, or None if answers are not
            labels.
        heldout_labels: count of each label in the held-out examples; empty if the task has no labels.
        rollouts: rollouts whose candidate was this version, oldest first.
    """

    manifest: Manifest
    judged: Judged
    confusion: ConfusionMatrix | None
    curve: tuple[TrainingPoint, ...]
    data: DataSummary
    heldout_labels: dict[str, int]
    run: RunRecord
    rollouts: tuple[RolloutView, ...] = ()

    def figures(self) -> dict[str, Any]:
        """Return the report's numbers as a JSON object. Prompts and answers are omitted, because they are in the
        version's own files.
        """
        judged, manifest = self.judged, self.manifest
        figures = {
            "version": str(manifest.id),
            "models": list(judged.evaluations),
            "verdicts": judged.verdicts,
            "metrics": {
                row.name: {"estimates": row.estimates, "changes": row.changes, "better": row.better}
                for row in judged.rows
            },
            "failed": manifest.failed,
            "confusion": self.confusion,
            "curve": [point.model_dump(exclude={"heldout_each"}) for point in self.curve],
            "worst": judged.worst,
            "lost": judged.lost,
            "side_by_side": judged.side_by_side,
            "data": self.data,
            "run": self.run,
            "findings": manifest.findings,
            "preferences": {name: preference.figures for name, preference in manifest.preferences.items()},
            "forgetting": manifest.forgetting,
            "gates": manifest.gates,
            "rollouts": self.rollouts,
        }
        return dict(to_jsonable_python(figures))


def gather_report(registry: Registry, version: VersionId, store: Store | None = None) -> Report:
    """Return the data for a version's report.

    Args:
        store: the store with the version's rollouts, or None to omit them.

    Raises:
        NotFoundError: the version does not exist.
        IntegrityError: one of the version's files is missing or was changed.
    """
    manifest = registry.manifest(version)
    judged = _judged(registry, manifest)
    answered = judged.results.get(judged.tuned or "", ())
    data = read_data_summary(registry.reference(version, DATA_SUMMARY_FILE))
    heldout = registry.heldout(version) if data.labels else ()
    return Report(
        manifest=manifest,
        judged=judged,
        confusion=confusion_matrix(judged.examples, answered) if answered else None,
        curve=read_training_curve(registry.reference(version, TRAINING_CURVE_FILE)),
        data=data,
        heldout_labels=dict(Counter(label_of(example.answer) for example in heldout)),
        run=read_record(registry.reference(version, RUN_RECORD_FILE), RunRecord),
        rollouts=_rollouts(store, version) if store else (),
    )


def _rollouts(store: Store, version: VersionId) -> tuple[RolloutView, ...]:
    records = read_rollouts(store, version.name)
    return tuple(RolloutView.of(record) for record in records if record.target.version == version)


def _judged(registry: Registry, manifest: Manifest) -> Judged:
    evaluations: dict[str, EvaluationReport] = {}
    results: dict[str, tuple[ExampleResult, ...]] = {}
    if manifest.base_evaluation:
        evaluations[BASE] = manifest.base_evaluation
        results[BASE] = registry.base_results(manifest.id)
    for format in reversed(SERVED_FORMATS):
        record = manifest.formats.get(format)
        if record and record.evaluation:
            evaluations[format] = record.evaluation
            results[format] = registry.results(manifest.id, format)
    examples = registry.heldout(manifest.id)[: manifest.judged_examples]
    return Judged(examples, evaluations, results)
