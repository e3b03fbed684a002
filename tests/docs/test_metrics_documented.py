"""docs/metrics.md and the code name the same metrics, labels and reasons, both ways."""

import re
from enum import StrEnum
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric

from serving.openai_api.errors import ErrorCode
from serving.quantiles import VersionQuantiles
from serving.traffic import _NOT_COMPLETIONS, Traffic
from svc.engine.state import EngineState
from svc.registry.version import Format
from svc.store.swaps import SwapOutcome

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text("utf-8")
ROW = re.compile(r"^\| `(svc_\w+)` \| (\w+) \|([\w, ]*)\|", re.MULTILINE)


@pytest.fixture(scope="module")
def families() -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric in the code, by the name that a scrape shows."""
    registry = CollectorRegistry()
    Traffic(registry)
    found = {}
    for collector in list(registry._collector_to_names):
        for family in collector.collect():
            name = family.name + ("_total" if family.type == "counter" else "")
            found[name] = family.type, _labels(collector, family)
    return found


def _labels(collector: object, family: Metric) -> set[str]:
    if isinstance(collector, MetricWrapperBase):
        return set(collector._labelnames)
    assert isinstance(collector, VersionQuantiles)
    return set(family._labelnames)  # type: ignore[attr-defined]


def test_every_metric_is_documented_with_its_type_and_labels(families: dict[str, tuple[str, set[str]]]) -> None:
    documented = {
        name: (kind, {label.strip() for label in labels.split(",") if label.strip()})
        for name, kind, labels in ROW.findall(PAGE)
    }
    assert documented == families


def test_every_label_is_explained(families: dict[str, tuple[str, set[str]]]) -> None:
    used = {label for _, labels in families.values() for label in labels}
    table = PAGE.partition("| label |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == used


def test_every_reason_is_explained() -> None:
    table = PAGE.partition("| reason | status |")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(ErrorCode) - _NOT_COMPLETIONS


@pytest.mark.parametrize(("label", "values"), [("outcome", SwapOutcome), ("state", EngineState), ("format", Format)])
def test_every_value_of_a_closed_label_is_named(label: str, values: type[StrEnum]) -> None:
    row = PAGE.partition(f"| `{label}` | ")[2].partition(" |\n")[0]
    assert set(re.findall(r"`(\w+)`", row)) == {value.value for value in values}
