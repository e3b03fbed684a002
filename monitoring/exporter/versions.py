"""Metrics of registered versions: their creation time, size and evaluation."""

import logging
from collections.abc import Collection, Iterable

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from svc.errors import IntegrityError, NotFoundError
from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.intervals import Interval
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.version import VersionId

log = logging.getLogger(__name__)

SHOWN_VERSIONS = 20
"""Maximum number of versions shown per model, newest first. The limit keeps the metrics page small even if the registry
is large."""
BASE = "base"
_SHOWN_DIGITS = 12  # of a held-out set's fingerprint: enough to distinguish the sets of one registry

_VERSION = ["model", "version"]
_EVALUATION = [*_VERSION, "heldout", "format", "metric", "primary"]
_GAUGES = (
    ("svc_registry_version_created_timestamp_seconds", "Unix time at which the version was registered", _VERSION),
    ("svc_registry_version_size_bytes", "Size on disk", [*_VERSION, "format"]),
    ("svc_registry_version_evaluation", "Held-out results at registration, including the base model's", _EVALUATION),
    ("svc_registry_version_evaluation_low", "Lower end of a held-out result's 95% interval", _EVALUATION),
    ("svc_registry_version_evaluation_high", "Upper end of a held-out result's 95% interval", _EVALUATION),
)


class VersionMetrics(Collector):
    """Collector for metrics of registered versions. It reads each manifest only once, because versions never change."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._manifests: dict[VersionId, Manifest] = {}

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of the newest `SHOWN_VERSIONS` versions of each model."""
        created, size, value, low, high = families = [
            GaugeMetricFamily(name, text, labels=labels) for name, text, labels in _GAUGES
        ]
        for manifest in self._newest():
            labels = [manifest.name, str(manifest.number)]
            created.add_metric(labels, manifest.created_at.timestamp())
            reports = {BASE: manifest.base_evaluation} if manifest.base_evaluation else {}
            for format, record in manifest.formats.items():
                size.add_metric([*labels, format.value], record.bytes)
                if record.evaluation:
                    reports[format.value] = record.evaluation
            for evaluated, report in reports.items():
                heldout = heldout_set(manifest.data.heldout_fingerprint, report.examples)
                for metric, estimate in _estimates(report).items():
                    of_metric = [*labels, heldout, evaluated, metric, str(metric == report.primary).lower()]
                    value.add_metric(of_metric, estimate.value)
                    low.add_metric(of_metric, estimate.low)
                    high.add_metric(of_metric, estimate.high)
        return families

    def _newest(self) -> Collection[Manifest]:
        versions = self._registry.versions
        shown = [version for name in self._registry.names() for version in versions(name)[-SHOWN_VERSIONS:]]
        self._manifests = {version: manifest for version in shown if (manifest := self._manifest(version))}
        return self._manifests.values()

    def _manifest(self, version: VersionId) -> Manifest | None:
        """Return a version's manifest, or None if it cannot be read or was removed.

        In that case, the other versions are still shown.
        """
        try:
            return self._manifests.get(version) or self._registry.manifest(version)
        except (IntegrityError, NotFoundError):
            log.warning("cannot read the metrics of %s", version, exc_info=True)
            return None


def heldout_set(fingerprint: str, examples: int) -> str:
    """Return a short name that identifies the evaluated examples. Only results with the same name are comparable.

    Args:
        fingerprint: hash of the complete held-out set, `sha256:<hex>`.
        examples: number of evaluated examples, which are the first ones in the set.
    """
    return f"{fingerprint.removeprefix('sha256:')[:_SHOWN_DIGITS]}:{examples}"


def _estimates(report: EvaluationReport) -> dict[str, Interval]:
    """Return an evaluation's results, keyed by metric, skipping metrics that were not measured."""
    figures = {"exact_match": report.exact_match, "valid_json": report.valid_json, "nll": report.nll}
    figures |= {name: figure.estimate for name, figure in report.figures.items()}
    return {name: estimate for name, estimate in figures.items() if estimate is not None}
