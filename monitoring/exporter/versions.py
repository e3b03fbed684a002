"""What is known of versions without serving them: when they were made, how large they are, how they were judged."""

import logging
from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from svc.errors import IntegrityError, NotFoundError
from svc.evaluation.evaluator import EvaluationReport
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.version import VersionId

log = logging.getLogger(__name__)

SHOWN_VERSIONS = 20
"""The newest of each name: a registry grows for ever, a page must not."""
BASE = "base"


class VersionMetrics(Collector):
    """Reads manifests, each one once: a version is never changed."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._manifests: dict[VersionId, Manifest] = {}

    def describe(self) -> Iterable[Metric]:
        """The families without samples."""
        return _families()

    def collect(self) -> Iterable[Metric]:
        """The newest versions of every name."""
        created, size, evaluation = families = _families()
        for manifest in self._newest():
            labels = [manifest.name, str(manifest.number)]
            created.add_metric(labels, manifest.created_at.timestamp())
            reports = {BASE: manifest.base_evaluation} if manifest.base_evaluation else {}
            for format, record in manifest.formats.items():
                size.add_metric([*labels, format.value], record.bytes)
                if record.evaluation:
                    reports[format.value] = record.evaluation
            for judged, report in reports.items():
                for metric, value in _figures(report).items():
                    evaluation.add_metric([*labels, judged, metric], value)
        return families

    def _newest(self) -> list[Manifest]:
        shown = [
            version for name in self._registry.names() for version in self._registry.versions(name)[-SHOWN_VERSIONS:]
        ]
        self._manifests = {version: found for version in shown if (found := self._manifest(version))}
        return list(self._manifests.values())

    def _manifest(self, version: VersionId) -> Manifest | None:
        """None for one that cannot be read, or was removed since: the others are shown all the same."""
        try:
            return self._manifests.get(version) or self._registry.manifest(version)
        except (IntegrityError, NotFoundError):
            log.warning("%s is not shown", version, exc_info=True)
            return None


def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
    version = ["model", "version"]
    return (
        GaugeMetricFamily(
            "svc_registry_version_created_timestamp_seconds", "When the version was registered", labels=version
        ),
        GaugeMetricFamily("svc_registry_version_size_bytes", "Size on disk", labels=[*version, "format"]),
        GaugeMetricFamily(
            "svc_registry_version_evaluation",
            "Held-out figures at registration, of the base too",
            labels=[*version, "format", "metric"],
        ),
    )


def _figures(report: EvaluationReport) -> dict[str, float]:
    """Without those that were not measured."""
    figures = {"exact_match": report.exact_match, "valid_json": report.valid_json, "nll": report.nll}
    return {name: estimate.value for name, estimate in figures.items() if estimate is not None}
