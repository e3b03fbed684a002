"""Tests that Alertmanager sends causes without the alerts that follow from them, and no pages for staging."""

import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.prometheus_rules import cases, rules
from tests.docs.pages import ROOT

FILE = ROOT / "deploy" / "alertmanager" / "alertmanager.yml"
PROGRAMS = ROOT / ".venv" / "alertmanager"
CONFIG: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
ALERTS = {rule["alert"]: rule for rule in rules("alert")}
Labels = dict[str, str]
Send = Callable[..., list[Labels]]


@pytest.fixture(scope="module")
def programs() -> Path:
    if not (PROGRAMS / "amtool").exists():
        pytest.skip("no Alertmanager here: see tests/deploy/fetch_alertmanager.sh")
    return PROGRAMS


@pytest.fixture(scope="module")
def alertmanager(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Run Alertmanager with this project's configuration and yield a client for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = [f"--config.file={FILE}", f"--storage.path={tmp_path_factory.mktemp('alertmanager')}"]
    options += [f"--web.listen-address={address}", "--cluster.listen-address=", "--log.level=error"]
    # Debian's Alertmanager reads templates only below /usr/share, which has them for this process only.
    place = "mount -t tmpfs none /usr/share && mkdir /usr/share/prometheus"
    place += f" && cp -r {programs}/templates /usr/share/prometheus/alertmanager"
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{place} && exec "$@"', "sh"]
    transport = httpx.HTTPTransport(retries=5)  # until it listens; each waits twice as long
    with (
        subprocess.Popen([*command, programs / "prometheus-alertmanager", *options]) as process,
        httpx.Client(base_url=f"http://{address}/api/v2", transport=transport) as client,
    ):
        try:
            client.get("/status").raise_for_status()
            yield client
        finally:
            process.terminate()


@pytest.fixture
def inhibited(alertmanager: httpx.Client, request: pytest.FixtureRequest) -> Send:
    """Return a function that sends alerts, with a job per test, and returns the labels of inhibited ones."""
    job = request.node.name

    def send(*alerts: Labels) -> list[Labels]:
        ends = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        sent = [{"labels": alert | {"job": job}, "endsAt": ends} for alert in alerts]
        alertmanager.post("/alerts", json=sent).raise_for_status()
        firing = alertmanager.get("/alerts", params={"filter": f'job="{job}"'}).raise_for_status().json()
        assert len(firing) == len(alerts)
        return [
            {name: value for name, value in alert["labels"].items() if name != "job"}
            for alert in firing
            if alert["status"]["inhibitedBy"]
        ]

    return send


def _alert(name: str, namespace: str = "production", **labels: str) -> Labels:
    return {"alertname": name, "namespace": namespace, **labels}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("namespace", "severity", "expected"),
    [
        ("production", "page", "pager"),
        ("tuneserve", "page", "pager"),
        ("production", "ticket", "tickets"),
        ("staging", "page", "tickets"),
        ("tuneserve-test", "page", "tickets"),
        ("dev", "page", "tickets"),
    ],
)
def test_alert_reaches_the_pager_only_if_its_severity_is_page_and_its_namespace_is_not_for_testing(
    programs: Path, namespace: str, severity: str, expected: str
) -> None:
    labels = [f"{name}={value}" for name, value in _alert("SvcEngineDown", namespace, severity=severity).items()]
    command = [str(programs / "amtool"), "config", "routes", "test", f"--config.file={FILE}", *labels]
    receiver = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    assert receiver == expected


@pytest.mark.slow
def test_error_alerts_for_a_model_are_inhibited_when_the_model_has_no_engine(
    inhibited: Send,
) -> None:
    errors = _alert("SvcAvailabilityBurnFast", model="m")
    others = [_alert("SvcAvailabilityBurnFast", model="n"), _alert("SvcAvailabilityBurnFast", "staging", model="m")]
    assert inhibited(_alert("SvcEngineDown", instance="a", model="m"), errors, *others) == [errors]


@pytest.mark.slow
def test_engine_alert_is_inhibited_when_the_monitor_that_supplies_its_data_is_down(inhibited: Send) -> None:
    stale, other = (_alert("SvcEngineDown", instance=instance, model="m") for instance in "ab")
    assert inhibited(_alert("SvcMonitorDown", instance="a"), stale, other) == [stale]


@pytest.mark.slow
def test_disk_and_training_alerts_are_not_inhibited_when_server_is_down(
    inhibited: Send,
) -> None:
    others = ("SvcDiskAlmostFull", "SvcTrainingFailed", "SvcBackupOld", "SvcGpuFault")
    assert inhibited(*(_alert(name, instance="a") for name in ("SvcServerDown", *others))) == []


@pytest.mark.slow
def test_server_down_alert_inhibits_only_alerts_from_the_same_server(inhibited: Send) -> None:
    own, other = (_alert("SvcHoldoutChanged", instance=instance, model="m", version="1") for instance in "ab")
    objective = _alert("SvcAvailabilityBurnFast", model="m")
    assert inhibited(_alert("SvcServerDown", instance="a"), own, other, objective) == [own]


@pytest.mark.slow
def test_ticket_severity_alerts_never_inhibit_page_severity_alerts(inhibited: Send) -> None:
    """Each page fires together with all tickets and with its own labels, so that no page causes another."""
    pages = [name for name, rule in ALERTS.items() if rule["labels"]["severity"] == "page"]
    tickets = ALERTS.keys() - pages
    fired = [
        _alert(name, f"of-{page}", instance="a", model="m", severity="page" if name == page else "ticket")
        for page in pages
        for name in (page, *tickets)
    ]
    assert [alert for alert in inhibited(*fired) if alert["severity"] == "page"] == []


def _labels_of(alert: str) -> set[str]:
    """Return the labels with which an alert fires in its own tests."""
    fired = [
        set(expected["exp_labels"])
        for case in cases()
        for check in case.get("alert_rule_test", [])
        if check["alertname"] == alert
        for expected in check.get("exp_alerts", [])
    ]
    return set.union(*fired) | {"namespace"}


def test_inhibition_rules_name_only_existing_alerts_and_labels() -> None:
    wrong = []
    for rule in CONFIG["inhibit_rules"]:
        for end in ("source", "target"):
            for pattern in re.findall(r'alertname=~?"([^"]*)"', rule[f"{end}_matchers"][0])[0].split("|"):
                named = [name for name in ALERTS if re.fullmatch(pattern, name)]
                wrong += [] if named else [f"{pattern}: no such alert"]
                if "SvcMonitorDown" not in str(rule):
                    lacking = {name: set(rule["equal"]) - _labels_of(name) for name in named}
                    wrong += [f"{name}: no label {labels}" for name, labels in lacking.items() if labels]
    assert wrong == []
