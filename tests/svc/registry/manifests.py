"""Creates manifests for any files of a version."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from svc.evaluation.evaluator import EvaluationReport, MetricReport
from svc.evaluation.intervals import Interval, mean, proportion
from svc.evaluation.metrics.text import ExactMatch
from svc.evaluation.results import ExampleResult
from svc.evaluation.verdict import Gate, GateReport, verdict_of
from svc.registry.files import record_file, record_files
from svc.registry.manifest import BaseRecord, DataRecord, FormatRecord, Manifest
from svc.registry.registry import HELDOUT_FILE, REFERENCE_FOLDER
from svc.version import Format, VersionId


def exact_match_metrics(estimate: Interval) -> dict[str, MetricReport]:
    """Return the metrics of a report that contains only exact match."""
    return {
        ExactMatch.name: MetricReport(
            title=ExactMatch.title, estimate=estimate, better=ExactMatch.better, unit=ExactMatch.unit
        )
    }


def report(hits: int = 1, total: int = 2) -> EvaluationReport:
    """Return an evaluation in which the first `hits` examples are right."""
    return EvaluationReport(
        examples=total,
        exact_match=proportion(hits, total),
        valid_json=None,
        cut_off=proportion(0, total),
        nll=mean([1.0] * total),
        hits=tuple(index < hits for index in range(total)),
        seconds=1.0,
        metrics=exact_match_metrics(proportion(hits, total)),
        primary=ExactMatch.name,
    )


def result(answer: str = "a", *, hit: bool = True) -> ExampleResult:
    """Return a version's result on one example."""
    return ExampleResult(
        answer=answer, tokens=2, limit=8, finish_reason="stop", logprob=-0.5, nll=1.0, scored=1, hit=hit
    )


def gate_report(high: float = 0.09) -> GateReport:
    """Return the verdict on a loss of 0.01 over 60 examples. It depends on the highest loss not excluded."""
    loss = Interval(value=0.01, low=0.02 - high, high=high)
    return GateReport(
        gate=Gate.GPTQ_LOSS,
        measured="GPTQ lowered accuracy by 0.010: 0.700 [0.575, 0.801] merged, 0.690 [0.565, 0.793] quantized",
        limit="evaluate.max_gptq_loss",
        verdict=verdict_of(loss, 0.05, 60),
    )


def make_manifest(version: VersionId, folder: Path, **changes: Any) -> Manifest:
    """Return a manifest that includes all formats in the folder."""
    present = [format for format in Format if (folder / format).is_dir()]
    values: dict[str, Any] = {
        "name": version.name,
        "number": version.number,
        "created_at": datetime(2026, 1, 2, tzinfo=UTC),
        "run": "run-1",
        "tracking_run": "abc",
        "base": BaseRecord(origin="./base", revision="sha256:0", licence="Apache-2.0"),
        "recipe": {"name": version.name},
        "data": DataRecord(
            train_fingerprint="sha256:1", train_examples=2, heldout_fingerprint="sha256:2", heldout_examples=2
        ),
        "heldout": record_file(folder, folder / HELDOUT_FILE),
        "reference": record_files(folder, folder / REFERENCE_FOLDER),
        "base_evaluation": report(),
        "formats": {f: FormatRecord(files=record_files(folder, folder / f), evaluation=report()) for f in present},
        "libraries": {"torch": "2.13"},
        "failed": (),
        "parity": None,
        "judge": None,
        "findings": (),
        "forgetting": {},
    }
    return Manifest(**(values | changes))
