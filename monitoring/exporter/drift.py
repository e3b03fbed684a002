"""Drift and held-out quality metrics for the production versions, taken from their latest checks and runs."""

import logging
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from monitoring.drift.check import REPORT
from monitoring.drift.production import production_targets
from monitoring.drift.quality import Quality, QualityReport, read_quality
from monitoring.drift.report import Status
from monitoring.drift.rows import read_drift_states
from svc.errors import SvcError
from svc.registry.registry import Registry
from svc.store.holdouts import HoldoutOutcome, newest_holdout_run
from svc.version import Target

log = logging.getLogger(__name__)
_GAUGES = {
    "svc_drift_alarm": ("1 while a feature has an active alarm", ["signal", "feature"]),
    "svc_drift_watched": ("1 while new requests or ratings can be compared", ["signal"]),
    "svc_drift_items": (
        "Requests (for the signal people: ratings) compared since the version was first served",
        ["signal"],
    ),
    "svc_drift_score": ("Size of the difference between the newest 100 items and the reference", ["signal", "feature"]),
    "svc_drift_evidence": ("Evidence for a change, on a logarithmic scale: 0 none, 1 alarm", ["signal", "feature"]),
    "svc_drift_checked_timestamp_seconds": ("Unix time of the last drift check", []),
    "svc_holdout_changed": (
        "1 if the held-out results differ from the results at registration, which indicates a serving fault",
        [],
    ),
    "svc_holdout_nll": ("Held-out negative log-likelihood, in nats per token", ["when"]),
    "svc_holdout_exact_match": ("Share of held-out answers that match exactly", ["when"]),
    "svc_holdout_score": ("Primary metric of the held-out answers", ["metric", "when"]),
    "svc_holdout_pvalue": ("p-value of the change since registration", ["metric"]),
    "svc_holdout_examples": ("Examples in the newest held-out evaluation", []),
    "svc_holdout_run_timestamp_seconds": (
        "Unix time when the newest held-out evaluation ended, by outcome",
        ["outcome"],
    ),
}
"""Each gauge's help text, and its labels besides `model` and `version`."""
_Sample = tuple[str, list[str], float]
"""One sample of a gauge: the gauge's name, its label values in the order of `_GAUGES`, and the value."""


class DriftMetrics(Collector):
    """Collector that reads the results of drift checks and held-out evaluations from the store.

    Args:
        checking: whether drift checks run. For a version that was never checked, the time of the last check is
            exported as 0 if checks run, and omitted otherwise.
    """

    def __init__(self, registry: Registry, store: Store, *, checking: bool = True) -> None:
        self._store = store
        self._checking = checking

        @lru_cache
        def quality_after(run_id: int | None, target: Target) -> QualityReport:
            return read_quality(registry, store, target)

        self._quality_after = quality_after

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of every production version whose results can be read."""
        families = {
            name: GaugeMetricFamily(name, text, labels=["model", "version", *labels])
            for name, (text, labels) in _GAUGES.items()
        }
        try:
            targets = production_targets(self._store)
        except SQLAlchemyError:
            log.warning("cannot read drift metrics", exc_info=True)
            return families.values()
        for target in targets:
            version = [target.version.name, str(target.version.number)]
            try:
                for name, labels, value in chain(self._signals(target), self._holdout(target)):
                    families[name].add_metric([*version, *labels], value)
            except (SvcError, SQLAlchemyError, ValueError):
                log.warning("cannot read the drift metrics of %s", target, exc_info=True)
        return families.values()

    def _signals(self, target: Target) -> Iterator[_Sample]:
        states = read_drift_states(self._store, target)
        for state in states.values():
            report = REPORT.validate_json(state.report)
            signal, status = report.signal.value, report.status
            yield "svc_drift_watched", [signal], float(status in (Status.STEADY, Status.ALARM))
            yield "svc_drift_items", [signal], report.items
            for line in report.lines:
                yield "svc_drift_score", [signal, line.name], line.score
                yield "svc_drift_evidence", [signal, line.name], line.evidence
            alarmed = {alarm.feature for alarm in report.alarms}
            for feature in sorted(alarmed | {line.name for line in report.lines}):
                yield "svc_drift_alarm", [signal, feature], float(feature in alarmed)
        if states or self._checking:
            checked = min((state.checked_at.timestamp() for state in states.values()), default=0.0)
            yield "svc_drift_checked_timestamp_seconds", [], checked

    def _holdout(self, target: Target) -> Iterator[_Sample]:
        completed = newest_holdout_run(self._store, target)
        newest = newest_holdout_run(self._store, target, completed=False)
        failed = newest if newest and newest.outcome is HoldoutOutcome.FAILED else None
        for outcome, run in ((HoldoutOutcome.COMPLETED, completed), (HoldoutOutcome.FAILED, failed)):
            ended = run.ended_at.timestamp() if run else 0.0
            yield "svc_holdout_run_timestamp_seconds", [outcome.value], ended
        report = self._quality_after(completed.id if completed else None, target)
        if report.quality is Quality.UNKNOWN:
            return
        yield "svc_holdout_changed", [], float(report.quality is Quality.CHANGED)
        yield "svc_holdout_examples", [], report.examples
        for when, nll, exact_match, score in (
            ("registration", report.registered_nll, report.registered_exact_match, report.registered_score),
            ("now", report.nll, report.exact_match, report.score),
        ):
            yield "svc_holdout_nll", [when], nll
            yield "svc_holdout_exact_match", [when], exact_match
            yield "svc_holdout_score", [report.metric, when], score
        # If the watched metric is exact match, `score_p` is the p-value shown.
        pvalues = {"nll": report.nll_p, "exact_match": report.exact_match_p, report.metric: report.score_p}
        for metric, p in pvalues.items():
            yield "svc_holdout_pvalue", [metric], p
