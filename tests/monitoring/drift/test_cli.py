"""Tests the table and the JSON output of `svc drift NAME`."""

import json
import re
from pathlib import Path

import pytest
from sqlalchemy import Engine as Store

from monitoring.drift.check import LOCK_FILE
from svc.files.lock import hold_lock
from svc.registry.registry import REFERENCE_FOLDER, Registry, results_file
from svc.remote.server_url import LOCK_FILE as SERVER_LOCK
from svc.store.audit import read_events
from svc.store.desired import change_desired
from tests.builders.status_pages import SERVER, STATE, serving
from tests.command_line import Ended, Svc
from tests.monitoring.drift.conftest import Check
from tests.monitoring.drift.traffic import Traffic, prompts, register, target

pytestmark = pytest.mark.slow


@pytest.fixture
def production(registry: Registry, store: Store) -> None:
    """Put version 1 into production."""
    change_desired(store, None, target(), None)


@pytest.fixture
def drift(svc: Svc, home: Path, production: None, monkeypatch: pytest.MonkeyPatch) -> "Drift":
    """Return a function that runs `svc drift` on the home, with content storage enabled."""
    return Drift(svc, home)


class Drift:
    """The `svc drift` command."""

    def __init__(self, svc: Svc, home: Path) -> None:
        self._svc = svc
        self._home = home

    def __call__(self, *arguments: str) -> Ended:
        return self._svc("--home", self._home, "drift", *arguments)


def test_cli_shows_alarm_with_its_feature_and_example_prompts(drift: Drift, traffic: Traffic) -> None:
    traffic.ask([*prompts("none")[:100], *prompts("strong")[:30]])
    shown = drift("triage@1").out
    assert "input   alarm: characters since 2026-11-01 13:" in shown
    assert shown.count("for example:") == len(set(re.findall(r"input +(\w+) +alarm", shown))) > 0
    assert shown.count("  req-") == 5 * shown.count("for example:")
    assert any(" ".join(text.split())[:60] in shown for text in prompts("strong")[:30])


def test_json_output_contains_alarms_with_complete_examples(drift: Drift, traffic: Traffic) -> None:
    traffic.ask([*prompts("none")[:100], *prompts("strong")[:30]])
    output = json.loads(drift("triage@1", "--json").out)
    alarm = next(alarm for alarm in output["alarms"] if alarm["feature"] == "characters")
    assert output["version"] == "triage@1"
    assert output["quality"]["quality"] == "unknown"
    assert {"signal", "feature", "since", "called_at", "ended_at", "moved", "examples"} == set(alarm)
    assert {example["prompt"] for example in alarm["examples"]} & set(prompts("strong"))
    (report,) = [report for report in output["signals"] if report["signal"] == "input"]
    assert report["status"] == "alarm"
    assert any(line["evidence"] == 1 for line in report["lines"])


def test_cli_shows_no_alarm_if_traffic_resembles_the_reference(drift: Drift, traffic: Traffic) -> None:
    traffic.ask(prompts("none")[:120])
    output = json.loads(drift("triage@1", "--json").out)
    assert all(line["evidence"] < 1 for report in output["signals"] for line in report["lines"])
    assert output["alarms"] == []


def test_last_drift_result_is_shown_while_a_new_check_is_running(drift: Drift, traffic: Traffic, home: Path) -> None:
    traffic.ask(prompts("none")[:12])
    drift("triage@1")
    traffic.ask(prompts("none")[12:24])
    with hold_lock(home / LOCK_FILE, "the check"):
        ended = drift("triage@1")
    assert ended.code == 0
    assert "the result of the previous check" in ended.err
    assert "(12 requests compared, newest" in ended.out


def test_drift_command_fails_for_an_unknown_model(drift: Drift) -> None:
    assert drift("other@1").code == 8


def test_bare_model_name_refers_to_its_production_version(
    drift: Drift, traffic: Traffic, registry: Registry, store: Store
) -> None:
    for number in (1, 2):
        register(registry, number, name="other")
    change_desired(store, None, target(1, "other"), None)
    traffic.ask([*prompts("none")[:100], *prompts("strong")[:30]])
    traffic.ask(prompts("none")[:12], name="other")
    other, triage = (json.loads(drift(name, "--json").out) for name in ("other", "triage"))
    assert (other["version"], triage["version"]) == ("other@1", "triage@1")
    assert [alarm["signal"] for alarm in other["alarms"]] == []
    assert "input" in [alarm["signal"] for alarm in triage["alarms"]]


def test_alarm_is_shown_even_if_its_example_rows_were_deleted(drift: Drift, traffic: Traffic, store: Store) -> None:
    traffic.ask([*prompts("none")[:100], *prompts("strong")[:30]])
    drift("triage@1")
    with store.begin() as connection:
        connection.exec_driver_sql("delete from requests")
    assert "(not stored)" in drift("triage@1").out


def test_svc_status_shows_drift_in_one_line(svc: Svc, home: Path, traffic: Traffic, check: Check) -> None:
    traffic.ask([*prompts("none")[:100], *prompts("strong")[:30]])
    check()
    checked = STATE | {"model": "triage", "version": "triage@1", "holdout": {"state": "off"}}
    server = SERVER | {"models": [checked, STATE | {"model": "other", "version": "other@1"}]}
    pages = {"/svc/status": (200, json.dumps(server)), "/metrics": (200, "")}
    with serving(pages) as url, hold_lock(home / SERVER_LOCK, "the home", url=url):
        shown = svc("--home", home, "status").out
        output = json.loads(svc("--home", home, "status", "--json").out)
    drift = {"input": "alarm", "output": "steady", "people": "waiting", "quality": "unknown"}
    assert "drift: input alarm  output steady  people waiting  quality unknown" in shown
    assert "drift: not checked" in shown
    assert {model["model"]: model["drift"] for model in output["models"]} == {"triage": drift, "other": {}}


def test_svc_status_shows_drift_as_not_checked_if_the_registered_results_are_damaged(
    svc: Svc, home: Path, traffic: Traffic, check: Check, registry: Registry
) -> None:
    traffic.ask(prompts("none")[:12])
    check()
    (registry.folder(target().version) / REFERENCE_FOLDER / results_file(target().format)).write_text("{}")
    server = SERVER | {"models": [STATE | {"model": "triage", "version": "triage@1", "holdout": {"state": "off"}}]}
    pages = {"/svc/status": (200, json.dumps(server)), "/metrics": (200, "")}
    with serving(pages) as url, hold_lock(home / SERVER_LOCK, "the home", url=url):
        ended = svc("--home", home, "status")
    assert ended.code == 0, ended.err
    assert "drift: not checked" in ended.out


def test_accepted_traffic_becomes_the_reference_for_later_traffic(drift: Drift, traffic: Traffic, store: Store) -> None:
    traffic.ask([*prompts("none")[:100], *prompts("strong")[:80]])
    accepted = drift("triage@1", "--accept")
    assert accepted.code == 0
    assert "accepted: " in accepted.err
    traffic.ask(prompts("strong")[80:200])
    later = json.loads(drift("triage@1", "--json").out)
    assert [alarm for alarm in later["alarms"] if alarm["ended_at"] is None] == []
    (event,) = read_events(store, newest=1)
    assert (event.action, event.subject) == ("drift.accept", "triage@1")


def test_accepting_drift_is_refused_without_an_alarm(drift: Drift, traffic: Traffic) -> None:
    traffic.ask(prompts("none")[:50])
    refused = drift("triage@1", "--accept")
    assert refused.code == 14
    assert "no active drift alarm" in refused.err


def test_accepting_drift_is_refused_if_too_few_requests_show_the_change(drift: Drift, traffic: Traffic) -> None:
    traffic.ask([*prompts("none")[:100], *prompts("strong")[:20]])
    refused = drift("triage@1", "--accept")
    assert refused.code == 14
    assert "at least 50" in refused.err


def test_accepting_drift_is_refused_if_too_few_requests_show_the_later_of_two_changes(
    drift: Drift, traffic: Traffic
) -> None:
    traffic.ask([*prompts("none")[:100], *prompts("strong")[:60]])
    traffic.ask(prompts("strong")[60:90], system="You are a pirate.")
    refused = drift("triage@1", "--accept")
    assert refused.code == 14
    assert "at least 50" in refused.err
