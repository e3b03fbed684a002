"""Tests that the exporter shows the newest check and the newest held-out evaluation of the versions in production."""

from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine as Store

from monitoring.drift.check import DriftCheck
from monitoring.drift.production import ProductionChecks
from monitoring.drift.rows import read_drift_states
from monitoring.exporter.drift import DriftMetrics
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.store.deployments import add_deployment, remove_deployment
from svc.store.desired import change_desired
from svc.store.holdouts import HoldoutOutcome, add_holdout_run
from svc.store.leases import Lease
from svc.version import Target
from tests.builders.holdout_runs import run
from tests.monitoring.drift.traffic import NAME, Traffic, open_registry, prompts, register, target
from tests.new_store import new_store

pytestmark = pytest.mark.slow

VERSION = {"model": "triage", "version": "1"}
OTHER = {"model": "other", "version": "1"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path)


@pytest.fixture
def registry(tmp_path: Path, store: Store) -> Registry:
    registry = open_registry(tmp_path)
    register(registry)
    change_desired(store, None, target(), None)
    add_deployment(store, NAME)
    return registry


@pytest.fixture
def metrics(registry: Registry, store: Store) -> CollectorRegistry:
    metrics = CollectorRegistry()
    metrics.register(DriftMetrics(registry, store))
    return metrics


@pytest.fixture
def checks(tmp_path: Path, registry: Registry) -> ProductionChecks:
    return ProductionChecks(Settings(home=tmp_path))


@pytest.fixture
def other(registry: Registry, store: Store) -> Target:
    """Return the target of a second served model."""
    second = target(name="other")
    register(registry, name="other")
    change_desired(store, None, second, None)
    add_deployment(store, "other")
    return second


def test_drift_of_every_served_model_is_checked_and_exported(
    metrics: CollectorRegistry, checks: ProductionChecks, store: Store, registry: Registry, other: Target
) -> None:
    Traffic(store, registry).ask([*prompts("none")[:100], *prompts("strong")[:30]], name="other")
    checks()
    for version, items, alarm in ((VERSION, 0, 0), (OTHER, 130, 1)):
        signal = {**version, "signal": "input"}
        assert metrics.get_sample_value("svc_drift_items", signal) == items
        shown = metrics.get_sample_value("svc_drift_alarm", {**signal, "feature": "characters"})
        assert (shown or 0) == alarm
        assert metrics.get_sample_value("svc_drift_checked_timestamp_seconds", version)
    registered = registry.results(other.version, other.format)
    worse = run([one.nll + 1 for one in registered], [one.hit for one in registered])
    add_holdout_run(store, replace(worse, target=other))
    assert metrics.get_sample_value("svc_holdout_changed", OTHER) == 1
    assert metrics.get_sample_value("svc_holdout_changed", VERSION) is None


def test_drift_of_a_removed_model_is_neither_checked_nor_exported(
    metrics: CollectorRegistry, checks: ProductionChecks, store: Store, other: Target
) -> None:
    remove_deployment(store, other.version.name)
    checks()
    assert read_drift_states(store, other) == {}
    assert read_drift_states(store, target()) != {}
    assert metrics.get_sample_value("svc_drift_checked_timestamp_seconds", OTHER) is None
    assert metrics.get_sample_value("svc_drift_checked_timestamp_seconds", VERSION)


def test_failed_check_of_one_model_does_not_stop_checks_of_other_models(
    checks: ProductionChecks, store: Store, other: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpatched = DriftCheck.run

    def run(check: DriftCheck, target: Target, lease: Lease | None) -> object:
        if target.version.name == NAME:
            raise ValueError("a defect")
        return unpatched(check, target, lease)

    monkeypatch.setattr(DriftCheck, "run", run)
    checks()
    assert read_drift_states(store, other) != {}


def test_time_of_the_last_drift_check_is_zero_for_a_version_that_was_never_checked(metrics: CollectorRegistry) -> None:
    assert metrics.get_sample_value("svc_drift_checked_timestamp_seconds", VERSION) == 0
    assert metrics.get_sample_value("svc_holdout_changed", VERSION) is None


def test_time_of_the_last_drift_check_is_not_exported_if_drift_checks_are_off(registry: Registry, store: Store) -> None:
    metrics = CollectorRegistry()
    metrics.register(DriftMetrics(registry, store, checking=False))
    assert metrics.get_sample_value("svc_drift_checked_timestamp_seconds", VERSION) is None


def test_drift_alarm_is_exported_with_its_feature(
    metrics: CollectorRegistry, checks: ProductionChecks, store: Store, registry: Registry
) -> None:
    Traffic(store, registry).ask([*prompts("none")[:100], *prompts("strong")[:30]])
    checks()
    signal = {**VERSION, "signal": "input"}
    characters = {**signal, "feature": "characters"}
    assert metrics.get_sample_value("svc_drift_alarm", characters) == 1
    assert metrics.get_sample_value("svc_drift_alarm", {**signal, "feature": "turns"}) == 0
    assert metrics.get_sample_value("svc_drift_watched", signal) == 1
    assert metrics.get_sample_value("svc_drift_items", signal) == 130
    assert (metrics.get_sample_value("svc_drift_score", characters) or 0) > 0.2
    assert metrics.get_sample_value("svc_drift_evidence", characters) == 1
    assert (metrics.get_sample_value("svc_drift_score", {**signal, "feature": "domain_classifier"}) or 0) > 0.6
    assert metrics.get_sample_value("svc_drift_checked_timestamp_seconds", VERSION)


def test_drift_signal_waiting_for_data_is_exported_as_unwatched(
    metrics: CollectorRegistry, checks: ProductionChecks, store: Store, registry: Registry
) -> None:
    Traffic(store, registry).ask(prompts("none")[:3])
    checks()
    assert metrics.get_sample_value("svc_drift_watched", {**VERSION, "signal": "input"}) == 0
    assert metrics.get_sample_value("svc_drift_watched", {**VERSION, "signal": "people"}) == 0


def test_held_out_evaluation_results_are_exported_as_metrics(
    metrics: CollectorRegistry, registry: Registry, store: Store
) -> None:
    registered = registry.results(target().version, target().format)
    good = run([one.nll for one in registered], [one.hit for one in registered])
    ended = {**VERSION, "outcome": "completed"}
    assert metrics.get_sample_value("svc_holdout_run_timestamp_seconds", ended) == 0
    add_holdout_run(store, good)
    assert metrics.get_sample_value("svc_holdout_run_timestamp_seconds", ended) == good.ended_at.timestamp()
    assert metrics.get_sample_value("svc_holdout_changed", VERSION) == 0
    assert metrics.get_sample_value("svc_holdout_examples", VERSION) == 200
    assert metrics.get_sample_value("svc_holdout_nll", {**VERSION, "when": "now"}) == pytest.approx(0.2)
    assert metrics.get_sample_value("svc_holdout_exact_match", {**VERSION, "when": "registration"}) == 0.75
    by_name = {**VERSION, "metric": "exact_match", "when": "now"}
    assert metrics.get_sample_value("svc_holdout_score", by_name) == 0.75
    assert metrics.get_sample_value("svc_holdout_pvalue", {**VERSION, "metric": "nll"}) == 1
    add_holdout_run(store, replace(good, nll=tuple(value + 1 for value in good.nll)))
    assert metrics.get_sample_value("svc_holdout_changed", VERSION) == 1


def test_time_of_a_failed_held_out_evaluation_is_exported(metrics: CollectorRegistry, store: Store) -> None:
    failed = replace(run([], []), outcome=HoldoutOutcome.FAILED, reason="away")
    add_holdout_run(store, failed)
    shown = metrics.get_sample_value("svc_holdout_run_timestamp_seconds", {**VERSION, "outcome": "failed"})
    assert shown == failed.ended_at.timestamp()


def test_unreadable_version_does_not_prevent_the_export_of_other_versions(
    metrics: CollectorRegistry, checks: ProductionChecks, store: Store, registry: Registry
) -> None:
    Traffic(store, registry).ask(prompts("none")[:12])
    (registry.folder(target().version) / "reference" / "gptq.jsonl").chmod(0o644)
    (registry.folder(target().version) / "reference" / "gptq.jsonl").write_text("{}")
    checks()
    add_holdout_run(store, run([1.0], [True]))
    assert metrics.get_sample_value("svc_holdout_changed", VERSION) is None


def test_drift_is_exported_even_if_version_quality_is_unreadable(
    metrics: CollectorRegistry, checks: ProductionChecks, store: Store, registry: Registry
) -> None:
    Traffic(store, registry).ask(prompts("none")[:12])
    checks()
    add_holdout_run(store, run([1.0], [True]))
    answers = registry.folder(target().version) / "reference" / "gptq.jsonl"
    answers.chmod(0o644)
    answers.write_text("{}")
    assert metrics.get_sample_value("svc_holdout_changed", VERSION) is None
    characters = {**VERSION, "signal": "input", "feature": "characters"}
    assert metrics.get_sample_value("svc_drift_alarm", characters) == 0
