"""Runs the real drift check on the simulated request rows every ten simulated minutes."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

from prometheus_client import CollectorRegistry

from benchmarks.week.events import HOLDOUT_S, Change
from benchmarks.week.server import EPOCH, Page, page_of
from benchmarks.week.timetable import MAIN, MODELS, SIDE
from monitoring.drift.check import DriftCheck
from monitoring.drift.production import production_targets
from monitoring.drift.rows import DriftAlarm, read_drift_alarms
from monitoring.exporter.drift import DriftMetrics
from svc.drift_reference.item import ItemMaker
from svc.drift_reference.reference import read_reference
from svc.redaction import Redactor
from svc.settings.monitoring import RequestLogSettings
from svc.store.deployments import add_deployment
from svc.store.desired import change_desired, read_desired
from svc.store.drift_items import add_items
from svc.store.holdouts import HoldoutOutcome, HoldoutRun, add_holdout_run
from svc.store.requests import RequestRecord, add_requests
from svc.version import Format, Target, VersionId
from tests.monitoring.drift.traffic import open_registry, register
from tests.new_store import new_store
from tests.serving.versions import FACTS

CHECK_MINUTES = 10
_VERSIONS = {MAIN: 2, SIDE: 3}
"""Number of versions per model; models that are not listed have one."""


class DriftMonitor:
    """The drift part of `svc monitor`, with the metrics that it exports.

    Args:
        home: an empty folder.
        checking: whether to check traffic for drift; held-out results are always exported.
    """

    def __init__(self, home: Path, *, checking: bool = True) -> None:
        self._checking = checking
        self._store = new_store(home)
        self._registry = open_registry(home)
        for name in MODELS:
            for number in range(1, _VERSIONS.get(name, 1) + 1):
                register(self._registry, number, name=name)
            add_deployment(self._store, name)
        self._now = EPOCH
        self._maker = cache(lambda target: ItemMaker(read_reference(self._registry, target, Redactor(()))))
        self._check = DriftCheck(self._registry, self._store, RequestLogSettings(), clock=lambda: self._now)
        self._metrics = CollectorRegistry()
        self._metrics.register(DriftMetrics(self._registry, self._store, checking=checking))
        self._page: Page = {}

    def drift_pages(
        self, minute: int, records: Sequence[RequestRecord], targets: Sequence[Target], holdouts: Sequence[Change]
    ) -> Page:
        """Store the events since the last call, check for drift if due, and return this minute's metrics page.

        Args:
            records: request log rows written since the last call.
            targets: served target of each model.
            holdouts: held-out evaluations that finished since the last call.
        """
        self._now = EPOCH + timedelta(minutes=minute)
        promoted = self._promote(targets)
        if self._checking and records:
            add_requests(self._store, [record._replace(prompt=None, answer=None) for record in records])
            self._add_items(records)
        for run in holdouts:
            self._add_run(run, next(target for target in targets if target.version.name == run.model))
        checks = self._checking and (promoted or minute % CHECK_MINUTES == 0)
        if checks:
            for target in production_targets(self._store):
                self._check.run(target)
        if checks or promoted or holdouts:
            self._page = page_of(self._metrics.collect())
        return self._page

    def alarms(self) -> list[tuple[Target, DriftAlarm]]:
        """Return the drift alarms of all versions, oldest first."""
        targets = [
            Target(VersionId(name, number), Format.GPTQ)
            for name in MODELS
            for number in range(1, _VERSIONS.get(name, 1) + 1)
        ]
        alarms = [(target, alarm) for target in targets for alarm in read_drift_alarms(self._store, target)]
        return sorted(alarms, key=lambda pair: pair[1].called_at)

    def _add_items(self, records: Sequence[RequestRecord]) -> None:
        """Store the features of complete answers, as the real server does."""
        by_target = dict[Target, list[RequestRecord]]()
        for record in records:
            if record.status == 200 and record.version and record.format and record.prompt is not None:
                by_target.setdefault(Target(record.version, record.format), []).append(record)
        for target, answered in by_target.items():
            add_items(self._store, target, self._maker(target).make(answered))

    def _promote(self, targets: Sequence[Target]) -> bool:
        promoted = False
        for target in targets:
            seen = read_desired(self._store, target.version.name)
            if seen is None or seen.target != target:
                change_desired(self._store, seen, target, seen.target if seen else None)
                promoted = True
        return promoted

    def _add_run(self, run: Change, target: Target) -> None:
        """Store a held-out evaluation that reproduces the registered answers."""
        assert run.holdout is not None
        registered = self._registry.results(target.version, target.format)
        ended: datetime = EPOCH + timedelta(seconds=run.at)
        add_holdout_run(
            self._store,
            HoldoutRun(
                target=target,
                engine=FACTS,
                cause=run.holdout,
                started_at=ended - timedelta(seconds=HOLDOUT_S),
                ended_at=ended,
                outcome=HoldoutOutcome.COMPLETED,
                places=tuple(range(len(registered))),
                hits=tuple(result.hit for result in registered),
                nll=tuple(result.nll for result in registered),
                metric="exact_match",
                scores=tuple(float(result.hit) for result in registered),
            ),
        )
