"""Tests that docs/metrics.md and the code list the same metrics, labels and reasons."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric

from monitoring.drift.budget import Signal
from monitoring.drift.domain_classifier import CLASSIFIER
from monitoring.drift.ratings import RatingFeature
from monitoring.exporter.deadlines import DeadlineMetrics
from monitoring.exporter.drift import DriftMetrics
from monitoring.exporter.server_page import ServerPage
from monitoring.exporter.training import TrainingMetrics
from monitoring.exporter.versions import BASE, VersionMetrics
from serving.access.authenticator import KeyFault
from serving.telemetry.deployment_metrics import DeploymentInstruments
from serving.telemetry.machine_metrics import add_machine_metrics
from serving.telemetry.metrics import GatewayMetrics
from serving.telemetry.traces.request_trace import SpanDropped
from svc.drift_reference.answer import AnswerFeature
from svc.drift_reference.prompt import PromptFeature
from svc.engine.state import EngineState
from svc.errors import ServerNotRunningError
from svc.registry.registry import Registry
from svc.remote.server_url import ServerAddress
from svc.settings.engine import EngineSettings
from svc.settings.settings import Settings
from svc.store.feedback import Rating
from svc.store.holdouts import HoldoutOutcome
from svc.store.requests import Dropped, RequestOutcome
from svc.store.swaps import SwapOutcome
from svc.version import Format
from tests.new_store import new_store
from tests.svc.engine.devices import AVX512

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text("utf-8")
ROW = re.compile(r"^\| `(svc_\w+)` \| (\w+) \|([\w, ]*)\|", re.MULTILINE)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, set[str]]]:
    """Return the type and labels of each metric in the code, keyed by its name in a scrape."""
    registry = CollectorRegistry()
    home = tmp_path_factory.mktemp("home")
    GatewayMetrics(registry)
    DeploymentInstruments(registry)
    add_machine_metrics(registry, home, AVX512, EngineSettings())
    versions = Registry.of(Settings(home=home))
    registry.register(ServerPage(_no_server))
    registry.register(VersionMetrics(versions))
    registry.register(TrainingMetrics(versions, home))
    registry.register(DriftMetrics(versions, new_store(home)))
    registry.register(DeadlineMetrics(new_store(home), None))
    metrics = {}
    for collector in list(registry._collector_to_names):
        for family in collector.collect():
            name = family.name + ("_total" if family.type == "counter" else "")
            if name.startswith("svc_"):
                metrics[name] = family.type, _labels(collector, family)
    return metrics


def _no_server() -> ServerAddress:
    raise ServerNotRunningError("no server")


def _labels(collector: object, family: Metric) -> set[str]:
    if isinstance(collector, MetricWrapperBase):
        return set(collector._labelnames)
    return set(family._labelnames)  # type: ignore[attr-defined]


def test_every_metric_is_documented_with_its_type_and_labels(families: dict[str, tuple[str, set[str]]]) -> None:
    documented = {
        name: (kind, {label.strip() for label in labels.split(",") if label.strip()})
        for name, kind, labels in ROW.findall(PAGE)
    }
    assert documented == families


def test_every_metric_label_is_documented(families: dict[str, tuple[str, set[str]]]) -> None:
    used = {label for _, labels in families.values() for label in labels}
    table = PAGE.partition("| label |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", table, re.MULTILINE)
    assert {label for cell in named for label in re.findall(r"`(\w+)`", cell)} == used


def test_every_failure_reason_is_documented() -> None:
    registry = CollectorRegistry()
    GatewayMetrics(registry).show_errors(None)
    errors = next(family for family in registry.collect() if family.name == "svc_request_errors")
    counted = {sample.labels["reason"] for sample in errors.samples}
    table = PAGE.partition("| reason | status |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == counted


CLOSED: dict[str, set[str]] = {
    "outcome": {*RequestOutcome, *SwapOutcome, *HoldoutOutcome},
    "state": set(EngineState),
    "format": {*Format, BASE},
    "fault": set(KeyFault),
    "rating": set(Rating),
    "signal": set(Signal),
}


def test_all_values_of_enumerated_labels_are_documented() -> None:
    rows = {label: PAGE.partition(f"| `{label}` | ")[2].partition(" |\n")[0] for label in CLOSED}
    named = {label: set(re.findall(r"`(\w+)`", row)) for label, row in rows.items()}
    assert named == {label: {str(value) for value in values} for label, values in CLOSED.items()}


def test_every_reason_for_dropping_a_record_is_documented() -> None:
    row = PAGE.partition("| `reason` | ")[2].partition(" |\n")[0]
    assert {reason.value for reason in (*Dropped, *SpanDropped)} <= set(re.findall(r"`(\w+)`", row))


def test_every_compared_drift_feature_is_documented() -> None:
    features = {
        (Signal.INPUT.value, CLASSIFIER),
        *((Signal.INPUT.value, feature.value) for feature in PromptFeature),
        *((Signal.OUTPUT.value, feature.value) for feature in AnswerFeature),
        *((Signal.PEOPLE.value, feature.value) for feature in RatingFeature),
    }
    table = PAGE.partition("| signal | feature |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", table, re.MULTILINE)) == features
