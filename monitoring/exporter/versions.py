"""What is known of versions without serving them: when they were made, how large they are, how they were judged."""

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
"""The newest of each name: a registry grows for ever, a page must not."""
BASE = "base"
_SHOWN_DIGITS = 12  # of a fingerprint: enough to tell the sets of one registry apart

_VERSION = ["model", "version"]
_EVALUATION = [*_VERSION, "heldout", "format", "metric", "primary"]
_GAUGES = (
    ("svc_registry_version_created_timestamp_seconds", "When the version was registered", _VERSION),
    ("svc_registry_version_size_bytes", "Size on disk", [*_VERSION, "format"]),
    ("svc_registry_version_evaluation", "Held-out figures at registration, of the base too", _EVALUATION),
    ("svc_registry_version_evaluation_low", "Lower end of their 95 % intervals", _EVALUATION),
    ("svc_registry_version_evaluation_high", "Upper end of their 95 % intervals", _EVALUATION),
)


class VersionMetrics(Collector):
    """Reads manifests, each one once: a version is never changed."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._manifests: dict[VersionId, Manifest] = {}

    def collect(self) -> Iterable[Metric]:
        """The newest versions of every name."""
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
            for judged, report in reports.items():
                heldout = heldout_set(manifest.data.heldout_fingerprint, report.examples)
                for metric, estimate in _estimates(report).items():
                    of_metric = [*labels, heldout, judged, metric, str(metric == report.primary).lower()]
                    value.add_metric(of_metric, estimate.value)
                    low.add_metric(of_metric, estimate.low)
                    high.add_metric(of_metric, estimate.high)
        return families

    def _newest(self) -> Collection[Manifest]:
        versions = self._registry.versions
        shown = [version for name in self._registry.names() for version in versions(name)[-SHOWN_VERSIONS:]]
        self._manifests = {version: found for version in shown if (found := self._manifest(version))}
        return self._manifests.values()

    def _manifest(self, version: VersionId) -> Manifest | None:
        """None for one that cannot be read, or was removed since: the others are shown all the same."""
        try:
            return self._manifests.get(version) or self._registry.manifest(version)
        except (IntegrityError, NotFoundError):
            log.warning("%s is not shown", version, exc_info=True)
            return None


def heldout_set(fingerprint: str, examples: int) -> str:
    """A short name for the examples that a version was judged on: figures on others cannot be compared with its own.

    Args:
        fingerprint: of the whole held-out set, `sha256:<hex>`.
        examples: how many of it were asked, the first ones.
    """
    return f"{fingerprint.removeprefix('sha256:')[:_SHOWN_DIGITS]}:{examples}"


def _estimates(report: EvaluationReport) -> dict[str, Interval]:
    """Return those that were measured."""
    figures = {"exact_match": report.exact_match, "valid_json": report.valid_json, "nll": report.nll}
    figures |= {name: figure.estimate for name, figure in report.figures.items()}
    return {name: estimate for name, estimate in figures.items() if estimate is not None}
