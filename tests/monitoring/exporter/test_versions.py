"""Tests the metrics of registered versions: each evaluation result with its interval and example count."""

from itertools import product
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from monitoring.exporter.versions import SHOWN_VERSIONS, VersionMetrics
from svc.evaluation.evaluator import EvaluationReport, MetricReport
from svc.evaluation.intervals import mean, proportion
from svc.evaluation.metrics.metric import Better, Unit
from svc.registry.manifest import Manifest, write_manifest
from svc.registry.registry import Registry
from svc.version import Format, VersionId
from tests.monitoring.exporter.tracked_runs import TrackedRuns
from tests.serving.versions import make_version
from tests.svc.registry.manifests import exact_match_metrics

REPORT = EvaluationReport(
    examples=4,
    exact_match=proportion(3, 4),
    valid_json=proportion(2, 4),
    cut_off=proportion(0, 4),
    nll=mean([0.5, 1.0, 1.0, 1.5]),
    hits=(True, True, True, False),
    seconds=1.0,
    metrics=exact_match_metrics(proportion(3, 4)),
    primary="exact_match",
)
FINGERPRINT = "sha256:0123456789abcdef"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models", TrackedRuns())


@pytest.fixture
def metrics(registry: Registry) -> CollectorRegistry:
    metrics = CollectorRegistry()
    metrics.register(VersionMetrics(registry))
    return metrics


def judge(registry: Registry, version: VersionId, report: EvaluationReport) -> Manifest:
    """Rewrite a version's manifest with an evaluation of its first format and its base."""
    manifest = registry.manifest(version)
    formats = manifest.formats | {
        Format.MERGED: manifest.formats[Format.MERGED].model_copy(update={"evaluation": report})
    }
    data = manifest.data.model_copy(update={"heldout_fingerprint": FINGERPRINT})
    judged = manifest.model_copy(update={"base_evaluation": report, "formats": formats, "data": data})
    write_manifest(registry.folder(version), judged)
    return judged


def evaluation(metrics: CollectorRegistry, metric: str, suffix: str = "", **labels: str) -> float | None:
    """Return one evaluation metric of version 1."""
    where = {"model": "tuned", "version": "1", "heldout": "0123456789ab:4", "format": "merged", "metric": metric}
    where["primary"] = str(metric == REPORT.primary).lower()
    return metrics.get_sample_value(f"svc_registry_version_evaluation{suffix}", where | labels)


def test_version_registration_time_is_exported(registry: Registry, metrics: CollectorRegistry) -> None:
    manifest = registry.manifest(make_version(registry, 1))
    created = metrics.get_sample_value(
        "svc_registry_version_created_timestamp_seconds", {"model": "tuned", "version": "1"}
    )
    assert created == manifest.created_at.timestamp()


def test_size_of_every_version_format_is_exported(registry: Registry, metrics: CollectorRegistry) -> None:
    formats = (Format.MERGED, Format.GPTQ)
    manifest = registry.manifest(make_version(registry, 1, formats=formats))
    version = {"model": "tuned", "version": "1"}
    shown = [
        metrics.get_sample_value("svc_registry_version_size_bytes", version | {"format": format.value})
        for format in formats
    ]
    assert shown == [manifest.formats[format].bytes for format in formats]


def test_every_evaluation_metric_is_exported_with_its_interval(registry: Registry, metrics: CollectorRegistry) -> None:
    judge(registry, make_version(registry, 1), REPORT)
    for format, metric in product(("base", "merged"), ("exact_match", "valid_json", "nll")):
        estimate = getattr(REPORT, metric)
        shown = tuple(evaluation(metrics, metric, suffix, format=format) for suffix in ("", "_low", "_high"))
        assert shown == (estimate.value, estimate.low, estimate.high), (format, metric)


def test_primary_metric_is_marked_among_the_exported_evaluation_metrics(
    registry: Registry, metrics: CollectorRegistry
) -> None:
    rouge = MetricReport(title="ROUGE-L", estimate=proportion(1, 4), better=Better.HIGHER, unit=Unit.SHARE)
    figures = REPORT.metrics | {"rouge_l": rouge}
    judge(registry, make_version(registry, 1), REPORT.model_copy(update={"metrics": figures, "primary": "rouge_l"}))
    assert evaluation(metrics, "rouge_l", primary="true") == 0.25
    assert evaluation(metrics, "exact_match", primary="false") == 0.75
    assert evaluation(metrics, "rouge_l", primary="false") is None


def test_unmeasured_metric_is_not_exported(registry: Registry, metrics: CollectorRegistry) -> None:
    judge(registry, make_version(registry, 1), REPORT.model_copy(update={"valid_json": None}))
    assert evaluation(metrics, "valid_json") is None


def test_subset_of_a_held_out_set_is_labeled_as_a_separate_set(registry: Registry, metrics: CollectorRegistry) -> None:
    judge(registry, make_version(registry, 1), REPORT.model_copy(update={"examples": 3}))
    shown = [evaluation(metrics, "nll", heldout=heldout) for heldout in ("0123456789ab:4", "0123456789ab:3")]
    assert shown == [None, REPORT.nll.value]


@pytest.mark.slow
def test_only_the_newest_versions_are_exported(registry: Registry, metrics: CollectorRegistry) -> None:
    for number in range(1, SHOWN_VERSIONS + 3):
        judge(registry, make_version(registry, number), REPORT)
    newest = {str(number) for number in range(3, SHOWN_VERSIONS + 3)}
    for family in metrics.collect():
        assert {sample.labels["version"] for sample in family.samples} == newest
