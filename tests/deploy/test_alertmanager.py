"""Alertmanager sends the cause and not what follows from it, and wakes nobody up for staging."""

import re
from typing import Any

import pytest
import yaml

from tests.deploy.prometheus_rules import cases, rules
from tests.docs.pages import ROOT

CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "alertmanager" / "alertmanager.yml").read_text("utf-8"))
ALERTS = {rule["alert"]: rule for rule in rules("alert")}
MATCHER = re.compile(r'(\w+)(=~|!=|=)"(.*)"')
Labels = dict[str, str]


def _matches(matchers: list[str], labels: Labels) -> bool:
    """Return whether labels match, as Alertmanager decides: a label that is missing is empty."""
    for matcher in matchers:
        found = MATCHER.fullmatch(matcher)
        assert found, matcher
        label, operator, value = found.groups()
        given = labels.get(label, "")
        equal = bool(re.fullmatch(value, given)) if operator == "=~" else given == value
        if equal == (operator == "!="):
            return False
    return True


def _receiver(labels: Labels) -> str:
    route = CONFIG["route"]
    chosen = next((one for one in route["routes"] if _matches(one["matchers"], labels)), route)
    return str(chosen["receiver"])


def _inhibited(target: Labels, *sources: Labels) -> bool:
    return any(
        _matches(rule["source_matchers"], source)
        and _matches(rule["target_matchers"], target)
        and all(source.get(label, "") == target.get(label, "") for label in rule["equal"])
        for rule in CONFIG["inhibit_rules"]
        for source in sources
    )


def _alert(name: str, namespace: str = "production", **labels: str) -> Labels:
    return {"alertname": name, "job": "tuneserve", "namespace": namespace, **labels}


def _labels_of(alert: str) -> set[str]:
    """Return the labels with which an alert fires in its tests."""
    fired = [
        set(expected["exp_labels"])
        for case in cases()
        for check in case.get("alert_rule_test", [])
        if check["alertname"] == alert
        for expected in check.get("exp_alerts", [])
    ]
    return set.union(*fired) | {"namespace"}


@pytest.mark.parametrize("namespace", ["staging", "tuneserve-test", "dev"])
@pytest.mark.parametrize("severity", ["page", "ticket"])
def test_nobody_is_paged_when_an_alert_is_of_staging(namespace: str, severity: str) -> None:
    assert _receiver(_alert("SvcEngineDown", namespace, severity=severity)) == "tickets"


@pytest.mark.parametrize(("severity", "receiver"), [("page", "pager"), ("ticket", "tickets")])
@pytest.mark.parametrize("namespace", ["production", "tuneserve", ""])
def test_the_severity_decides_when_an_alert_is_of_production(namespace: str, severity: str, receiver: str) -> None:
    assert _receiver(_alert("SvcEngineDown", namespace, severity=severity)) == receiver


def test_the_errors_of_a_model_are_inhibited_when_the_model_has_no_engine() -> None:
    source = _alert("SvcEngineDown", instance="a", model="m")
    assert _inhibited(_alert("SvcAvailabilityBurnFast", model="m"), source)
    assert not _inhibited(_alert("SvcAvailabilityBurnFast", model="n"), source)
    assert not _inhibited(_alert("SvcAvailabilityBurnFast", "staging", model="m"), source)
    assert not _inhibited(source, source)


def test_a_stale_alert_is_inhibited_when_its_monitor_is_down() -> None:
    source = _alert("SvcMonitorDown", instance="a")
    assert _inhibited(_alert("SvcEngineDown", instance="a", model="m"), source)
    assert not _inhibited(_alert("SvcEngineDown", instance="b", model="m"), source)
    assert not _inhibited(source, source)


def test_the_disk_and_training_are_not_inhibited_when_the_server_is_down() -> None:
    source = _alert("SvcServerDown", instance="a")
    for name in ("SvcDiskAlmostFull", "SvcTrainingFailed", "SvcBackupOld", "SvcGpuFault"):
        assert not _inhibited(_alert(name, instance="a"), source)


def test_no_page_is_inhibited_by_a_ticket() -> None:
    for rule in CONFIG["inhibit_rules"]:
        sources, targets = (
            {name for name in ALERTS if _matches(rule[f"{end}_matchers"], {"alertname": name})}
            for end in ("source", "target")
        )
        pages = {name for name in targets if ALERTS[name]["labels"]["severity"] == "page"}
        assert not pages or all(ALERTS[name]["labels"]["severity"] == "page" for name in sources)


@pytest.mark.parametrize("rule", CONFIG["inhibit_rules"], ids=lambda rule: rule["source_matchers"][0])
def test_an_inhibition_names_alerts_that_exist_and_labels_that_they_have(rule: dict[str, Any]) -> None:
    for end in ("source", "target"):
        matchers = rule[f"{end}_matchers"]
        named = [name for name in ALERTS if _matches(matchers, {"alertname": name})]
        assert named
        for pattern in re.findall(r'=~?"([^"]*)"', matchers[0])[0].split("|"):
            assert any(re.fullmatch(pattern, name) for name in ALERTS), pattern
        if "SvcMonitorDown" not in str(rule):
            assert all(set(rule["equal"]) <= _labels_of(name) for name in named)
