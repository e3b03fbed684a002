"""Drift and held-out quality of the versions in production, as the newest checks and runs have them."""

import logging
from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from monitoring.drift.check import REPORT
from monitoring.drift.production import production_targets
from monitoring.drift.report import SignalReport, Status
from monitoring.quality import Quality, QualityReport, read_quality
from svc.errors import SvcError
from svc.registry.registry import Registry
from svc.store.drift import read_drift_states
from svc.store.holdouts import HoldoutOutcome, newest_holdout_run
from svc.version import Target

log = logging.getLogger(__name__)


class DriftMetrics(Collector):
    """Reads the store; checks nothing itself.

    Args:
        checking: checks are made; a version that was never checked was so in 1970 then, and not unknown.
    """

    def __init__(self, registry: Registry, store: Store, *, checking: bool = True) -> None:
        self._registry = registry
        self._store = store
        self._checking = checking
        self._qualities: dict[Target, tuple[int | None, QualityReport]] = {}

    def describe(self) -> Iterable[Metric]:
        """The families without samples."""
        return _families().values()

    def collect(self) -> Iterable[Metric]:
        """A version that cannot be read is left out: the others are shown all the same."""
        families = _families()
        try:
            targets = production_targets(self._store)
        except SQLAlchemyError:
            log.warning("no drift figures", exc_info=True)
            return families.values()
        for target in targets:
            try:
                self._add_signals(families, target)
                self._add_quality(families, target)
            except (SvcError, SQLAlchemyError, ValueError):
                log.warning("no drift figures of %s", target, exc_info=True)
        return families.values()

    def _add_signals(self, families: dict[str, GaugeMetricFamily], target: Target) -> None:
        version = _version(target)
        states = read_drift_states(self._store, target)
        for state in states.values():
            _add_signal(families, version, REPORT.validate_json(state.report))
        if states or self._checking:
            checked = min((state.checked_at.timestamp() for state in states.values()), default=0.0)
            families["svc_drift_checked_timestamp_seconds"].add_metric(version, checked)

    def _add_quality(self, families: dict[str, GaugeMetricFamily], target: Target) -> None:
        version = _version(target)
        ran = families["svc_holdout_run_timestamp_seconds"]
        completed = newest_holdout_run(self._store, target)
        newest = newest_holdout_run(self._store, target, completed=False)
        failed = newest if newest and newest.outcome is HoldoutOutcome.FAILED else None
        for outcome, run in ((HoldoutOutcome.COMPLETED, completed), (HoldoutOutcome.FAILED, failed)):
            ran.add_metric([*version, outcome.value], run.ended_at.timestamp() if run else 0.0)
        run_id = completed.id if completed else None
        known = self._qualities.get(target)
        if known is None or known[0] != run_id:
            known = run_id, read_quality(self._registry, self._store, target)
            self._qualities[target] = known
        if known[1].quality is not Quality.UNKNOWN:
            _add_quality(families, version, known[1])


def _add_signal(families: dict[str, GaugeMetricFamily], version: list[str], report: SignalReport) -> None:
    signal = [*version, report.signal.value]
    families["svc_drift_alarm"].add_metric(signal, float(report.status is Status.ALARM))
    families["svc_drift_watched"].add_metric(signal, float(report.status in (Status.STEADY, Status.ALARM)))
    families["svc_drift_items"].add_metric(signal, report.items)
    for line in report.lines:
        families["svc_drift_score"].add_metric([*signal, line.name], line.score)
        families["svc_drift_pvalue"].add_metric([*signal, line.name], line.p)


def _add_quality(families: dict[str, GaugeMetricFamily], version: list[str], report: QualityReport) -> None:
    families["svc_holdout_changed"].add_metric(version, float(report.quality is Quality.CHANGED))
    families["svc_holdout_examples"].add_metric(version, report.examples)
    for when, nll, exact_match, score in (
        ("registration", report.registered_nll, report.registered_exact_match, report.registered_score),
        ("now", report.nll, report.exact_match, report.score),
    ):
        families["svc_holdout_nll"].add_metric([*version, when], nll)
        families["svc_holdout_exact_match"].add_metric([*version, when], exact_match)
        families["svc_holdout_score"].add_metric([*version, report.metric, when], score)
    pvalues = {"nll": report.nll_p, "exact_match": report.exact_match_p, report.metric: report.score_p}
    for metric, p in pvalues.items():
        families["svc_holdout_pvalue"].add_metric([*version, metric], p)


def _version(target: Target) -> list[str]:
    return [target.version.name, str(target.version.number)]


def _families() -> dict[str, GaugeMetricFamily]:
    version = ["model", "version"]
    documentation = {
        "svc_drift_alarm": ("1 while drift is called", ["signal"]),
        "svc_drift_watched": ("1 when there is enough to compare, 0 when it is off or waits", ["signal"]),
        "svc_drift_items": ("Requests, or ratings, that were looked at since the version serves", ["signal"]),
        "svc_drift_score": ("How large the difference from the reference is, newest window", ["signal", "feature"]),
        "svc_drift_pvalue": ("p-value of this one comparison, newest window", ["signal", "feature"]),
        "svc_drift_checked_timestamp_seconds": ("When drift was checked", []),
        "svc_holdout_changed": ("1 when the version is not what it was at registration: a fault of serving", []),
        "svc_holdout_nll": ("Held-out negative log-likelihood, nats a token", ["when"]),
        "svc_holdout_exact_match": ("Share of held-out answers that are exactly right", ["when"]),
        "svc_holdout_score": ("The primary metric of the held-out answers, by its name", ["metric", "when"]),
        "svc_holdout_pvalue": ("p-value of the change since registration", ["metric"]),
        "svc_holdout_examples": ("Held-out examples that were asked", []),
        "svc_holdout_run_timestamp_seconds": ("When the newest run of the held-out set ended, by outcome", ["outcome"]),
    }
    return {
        name: GaugeMetricFamily(name, text, labels=[*version, *labels])
        for name, (text, labels) in documentation.items()
    }
