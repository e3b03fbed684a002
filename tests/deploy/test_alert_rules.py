"""Tests that promtool accepts the rules, that they fire exactly when due, and that the runbook covers them."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.prometheus_rules import FOLDER, cases, metrics, read_by, rules, seconds
from tests.docs.pages import ROOT, read

PROMTOOL = ROOT / ".venv" / "prometheus" / "bin" / "promtool"
ALERTS = {rule["alert"]: rule for rule in rules("alert")}
HEADINGS = set(re.findall(r"^### (\w+)$", read("docs/runbook.md").partition("\n## Alerts\n")[2], re.MULTILINE))
RUNBOOK = "{{ with $externalLabels.runbook }}{{ . }}{{ else }}file:///opt/tuneserve/docs/runbook.md{{ end }}"
COMPARISON = re.compile(r"[=!<>]=|[<>]")
# A vector, the operator, a number: the expression stays valid if `bool` is inserted after the operator.
PLAIN_COMPARISON = re.compile(r"[\w)}\]] ([=!<>]=|[<>]) \d+(\.\d+)?(?=\s|$)")


@pytest.fixture(scope="module")
def promtool() -> Path:
    if not PROMTOOL.exists():
        pytest.fail(f"{PROMTOOL} is missing: `make test-fast` installs it, and so does deploy/prometheus/install.sh")
    return PROMTOOL


def _run(promtool: Path, *arguments: str | Path) -> None:
    fewer_collections = os.environ | {"GOGC": "400"}  # of a few megabytes each
    done = subprocess.run(
        [promtool, *arguments], cwd=FOLDER, env=fewer_collections, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_accepts_its_configuration_file(promtool: Path) -> None:
    _run(promtool, "check", "config", "prometheus.yml")


def test_prometheus_accepts_the_alert_rules(promtool: Path) -> None:
    _run(promtool, "check", "rules", "--lint-fatal", *FOLDER.glob("rules/*.yml"))


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(FOLDER.glob("tests/*.yml")), ids=lambda file: file.stem)
def test_prometheus_rules_pass_their_promtool_tests(promtool: Path, file: Path) -> None:
    _run(promtool, "test", "rules", file)


def _checks(case: dict[str, Any], alert: str) -> list[dict[str, Any]]:
    return [check for check in case.get("alert_rule_test", []) if check["alertname"] == alert]


def _is_quiet_case(case: dict[str, Any], alert: str) -> bool:
    """Return whether an alert stays silent in a case with its own series, even after its `for` has passed."""
    rule, checks = ALERTS[alert], _checks(case, alert)
    series = {re.split(r"[{ ]", given["series"])[0] for given in case["input_series"]}
    late = [check for check in checks if seconds(check["eval_time"]) >= seconds(rule.get("for", "0s"))]
    return bool(late and series & read_by(rule["expr"])) and not any(check.get("exp_alerts") for check in checks)


@pytest.mark.slow
def test_every_alert_has_a_firing_and_a_silent_test_case() -> None:
    firing = {
        check["alertname"] for case in cases() for check in case.get("alert_rule_test", []) if check.get("exp_alerts")
    }
    assert ALERTS.keys() - firing == set()
    assert [alert for alert in ALERTS if not any(_is_quiet_case(case, alert) for case in cases())] == []


@pytest.mark.slow
def test_every_alert_in_a_test_case_exists() -> None:
    assert {check["alertname"] for case in cases() for check in case.get("alert_rule_test", [])} <= set(ALERTS)


@pytest.mark.slow
def test_values_of_every_recording_rule_are_tested() -> None:
    checks = [check for case in cases() for check in case.get("promql_expr_test", []) if check["exp_samples"]]
    checked = set().union(*(metrics(check["expr"]) for check in checks))
    assert checked == {rule["record"] for rule in rules("record")}


def test_runbook_and_rules_name_the_same_alerts() -> None:
    assert set(ALERTS) == HEADINGS


def test_every_alert_has_all_required_labels_and_annotations() -> None:
    wrong = [
        alert
        for alert, rule in ALERTS.items()
        if rule["labels"].get("severity") not in ("page", "ticket")
        or set(rule["annotations"]) != {"summary", "description", "runbook_url"}
        or rule["annotations"]["runbook_url"] != f"{RUNBOOK}#{alert.lower()}"
    ]
    assert wrong == []


def test_alert_severity_matches_the_runbook() -> None:
    sections = {alert: read("docs/runbook.md").partition(f"\n### {alert}\n\n")[2].lower() for alert in ALERTS}
    severities = {alert: rule["labels"]["severity"] for alert, rule in ALERTS.items()}
    assert [alert for alert in ALERTS if not sections[alert].startswith(f"{severities[alert]}.")] == []


def test_alert_expressions_compare_vectors_only_with_scalars() -> None:
    # Braces are removed: a matcher is not a comparison.
    expressions = [re.sub(r"\{[^}]*\}", "{}", rule["expr"]) for rule in ALERTS.values()]
    assert [one for one in expressions if len(COMPARISON.findall(one)) != len(PLAIN_COMPARISON.findall(one))] == []
