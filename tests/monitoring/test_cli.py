"""Tests that `svc status` shows the server's state, and fails with a hint if there is no server."""

import json
import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from monitoring.drift.budget import Signal
from monitoring.drift.check import REPORT
from monitoring.drift.report import SignalReport
from monitoring.drift.report import Status as DriftStatus
from monitoring.drift.rows import DriftState, keep_drift
from svc.files.lock import hold_lock
from svc.remote.server_url import LOCK_FILE
from svc.version import Format, Target, VersionId
from tests.builders.status_pages import SERVER, STATE, serving
from tests.command_line import Svc
from tests.new_store import new_store

METRICS = """
# TYPE svc_requests_total counter
svc_requests_total{model="tiny",version="2",route="chat",status="200"} 41
svc_requests_total{model="tiny",version="2",route="chat",status="503"} 1
# TYPE svc_tokens_total counter
svc_tokens_total{model="tiny",version="2",direction="in"} 1000
svc_tokens_total{model="tiny",version="2",direction="out"} 200
# TYPE svc_request_duration_quantile_seconds gauge
svc_request_duration_quantile_seconds{model="tiny",version="2",quantile="0.5"} 0.25
svc_request_duration_quantile_seconds{model="tiny",version="2",quantile="0.95"} 0.5
# TYPE svc_request_errors_total counter
svc_request_errors_total{model="tiny",version="2",reason="engine_died"} 1
svc_request_errors_total{model="tiny",version="2",reason="invalid_request"} 0
svc_request_errors_total{model="unknown",version="",reason="queue_overflow"} 1
"""


Status = Callable[..., Any]


@pytest.fixture
def status(svc: Svc, tmp_path: Path) -> Status:
    """Return a function that runs `svc status` for a server with the given state or pages."""

    def status(*options: str, pages: dict[str, tuple[int, str]] | None = None, **state: Any) -> Any:
        good = {"/svc/status": (200, json.dumps(SERVER | {"models": [STATE | state]})), "/metrics": (200, METRICS)}
        with serving(good | (pages or {})) as url, hold_lock(tmp_path / "home" / LOCK_FILE, "the home", url=url):
            return svc("--home", "home", "status", *options)

    return status


@pytest.mark.slow
def test_status_screen_summarizes_the_state_of_a_served_model(status: Status) -> None:
    ended = status()
    assert ended.code == 0
    for text in (
        "tiny@2 (gptq)  previous: tiny@1 (gptq)",
        "engine ready, 1 restarts; 3 requests running, 4 queued",
        "last swap: to tiny@2 (gptq), succeeded, 2026-01-02T03:04:05+00:00, inplace in 2.5 s, 5 running, "
        "6 queued for 1.23 s",
        "1000/200",
        "0.250 / 0.500 / - s",
        "errors by reason: engine_died 1, queue_overflow 1",
    ):
        assert text in ended.out


@pytest.mark.slow
def test_status_screen_lists_the_servers_when_several_share_the_store(status: Status) -> None:
    seen: dict[str, Any] = {"started_at": "2026-01-02T03:00:00+00:00", "seen_at": "2026-01-02T03:04:05+00:00"}
    servers = [
        {
            "id": "a",
            "address": "gpu-1:8000",
            **seen,
            "running": True,
            "serves": ["tiny@2 (gptq)"],
            "leads": ["*", "tiny"],
        },
        {"id": "b", "address": "gpu-2:8000", **seen, "running": False, "serves": [], "leads": []},
    ]
    page = SERVER | {"server": "a", "servers": servers}
    lines = [" ".join(line.split()) for line in status(pages={"/svc/status": (200, json.dumps(page))}).out.splitlines()]
    assert "gpu-1:8000 (this one) tiny@2 (gptq) 2026-01-02 03:04:05 everything else, tiny" in lines
    assert "gpu-2:8000 stopped reporting 2026-01-02 03:04:05 -" in lines


@pytest.mark.slow
def test_status_screen_shows_no_server_table_when_there_is_only_one_server(status: Status) -> None:
    page = SERVER | {"server": "", "servers": []}
    assert "last seen" not in status(pages={"/svc/status": (200, json.dumps(page))}).out


@pytest.mark.slow
def test_status_row_of_a_version_shows_its_requests_and_errors(status: Status) -> None:
    row = next(line for line in status().out.splitlines() if line.strip().startswith("tiny@2 ") and "1000" in line)
    assert row.split()[:4] == ["tiny@2", "42", "1", "1000/200"]


@pytest.mark.slow
def test_json_status_contains_the_same_information_as_the_status_screen(status: Status) -> None:
    output = json.loads(status("--json").out)
    (model,) = output["models"]
    assert model["version"] == "tiny@2"
    assert model["engine"] == {"state": "ready", "restarts": 1, "last_error": None}
    assert output["versions"]["tiny@2"]["requests"] == 42
    assert output["errors"] == {"engine_died": 1, "queue_overflow": 1}
    assert output["url"].startswith("http://127.0.0.1:")


@pytest.mark.slow
def test_verbose_status_shows_the_engine_settings(status: Status) -> None:
    rows = [line.split() for line in status("--verbose").out.splitlines()]
    assert ["threads", "2", "machine", "2", "cores", "of", "this", "process"] in rows
    assert ["block_size", "[auto]", "vLLM's", "default"] in rows
    assert "threads" not in status().out


@pytest.mark.slow
def test_verbose_json_status_contains_the_engine_settings(status: Status) -> None:
    assert json.loads(status("--verbose", "--json").out)["models"][0]["engine"] == STATE["engine"]


@pytest.mark.slow
def test_status_screen_says_if_the_engine_was_not_started(status: Status) -> None:
    engine = {"state": "failed", "restarts": 1, "last_error": None, "plan": None}
    assert "engine: not started" in status("--verbose", engine=engine).out


@pytest.mark.slow
def test_status_of_a_new_server_shows_no_swap_and_no_error(status: Status) -> None:
    ended = status(previous=None, last_swap=None, pages={"/metrics": (200, "")})
    assert ended.code == 0
    assert "previous: none" in ended.out
    assert "errors by reason: none" in ended.out
    assert "last swap" not in ended.out


@pytest.mark.slow
def test_status_shows_adapters_of_each_engine_and_marks_unverified_ones(status: Status) -> None:
    loaded = [{"version": "tiny@2", "verified": True}, {"version": "tiny@3", "verified": False}]
    out = status(engines=[STATE["engines"][0] | {"adapters": loaded}]).out
    assert "replica 0: adapters loaded: tiny@2, tiny@3 (not verified)" in out
    assert "adapters loaded" not in status().out


@pytest.mark.slow
def test_unverified_engine_is_shown_with_the_reason(status: Status) -> None:
    unverified = {"verified": False, "verification": "not verified: it would end it"}
    assert "replica 0: not verified: it would end it" in status(engines=[STATE["engines"][0] | unverified]).out
    verified = {"verified": True, "verification": "8 probes passed"}
    assert "8 probes" not in status(engines=[STATE["engines"][0] | verified]).out


@pytest.mark.slow
def test_status_shows_why_no_replica_can_be_added(status: Status) -> None:
    scaling = {"min": 1, "max": 4, "replicas": 2, "refused": "it needs about 9 GiB"}
    assert "2 replicas (from 1 to 4); no more can be added: it needs about 9 GiB" in status(scaling=scaling).out
    assert "replicas;" not in status(scaling=scaling | {"refused": None}).out


@pytest.mark.slow
def test_status_shows_a_swap_in_progress(status: Status) -> None:
    swap = STATE["last_swap"] | {"outcome": None, "kind": None, "queued_s": None, "running": None, "queued": None}
    assert "last swap: to tiny@2 (gptq), in progress" in status(last_swap=swap).out


@pytest.mark.slow
def test_status_is_shown_while_the_store_is_unavailable(status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVC_STORE__URL", "postgresql://svc@127.0.0.1:1/store")
    ended = status(store="unavailable", last_swap=None, rollout=None, holdout=None)
    assert ended.code == 0, ended.err
    assert "store: unavailable" in ended.out
    assert "engine ready" in ended.out


@pytest.mark.slow
def test_status_does_not_read_drift_from_svc_db_when_the_store_is_in_postgresql(
    status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = REPORT.dump_json(SignalReport(Signal.INPUT, DriftStatus.STEADY)).decode()
    state = DriftState(Signal.INPUT, "{}", report, datetime.now(UTC))
    keep_drift(new_store(tmp_path / "home"), Target(VersionId("tiny", 2), Format.GPTQ), [state], [])

    def drift() -> dict[str, str]:
        shown: dict[str, str] = json.loads(status("--json").out)["models"][0]["drift"]
        return shown

    assert drift()["input"] == "steady"
    monkeypatch.setenv("SVC_STORE__URL", "postgresql://svc@127.0.0.1:1/store")
    assert drift() == {}


ROLLOUT: dict[str, Any] = {
    "id": 3,
    "version": "tiny@3",
    "format": "gptq",
    "previous": "tiny@2",
    "state": "canary",
    "canary": 25.0,
    "requested_at": "2026-01-02T03:04:05Z",
    "step_began_at": "2026-01-02T03:04:05Z",
    "actor": "user:ann",
    "reason": "better",
    "forced": None,
    "ended_at": None,
    "outcome": None,
    "why": None,
    "signals": [
        {
            "signal": "errors",
            "outcome": "undecided",
            "production": 0.01,
            "candidate": 0.02,
            "low": -0.05,
            "high": 0.06,
            "margin": 0.01,
            "units": 120,
        },
        {
            "signal": "first_token",
            "outcome": "passed",
            "production": 0.4,
            "candidate": 0.41,
            "low": None,
            "high": 1.15,
            "margin": 1.2,
            "units": 118,
        },
    ],
    "steps": ["loading"],
}


@pytest.mark.slow
def test_status_shows_the_step_and_statistics_of_a_running_rollout(status: Status) -> None:
    began = datetime.now(UTC) - timedelta(days=2)
    lines = status(rollout=ROLLOUT | {"step_began_at": began.isoformat()}).out.splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.startswith("  rollout 3: ")]
    assert lines[first].startswith("  rollout 3: tiny@2 -> tiny@3, canary 25% for 2 days, 0:0")
    assert " ".join(lines[first + 1].split()) == "signal production candidate loss from to margin units verdict"
    assert lines[first + 2].split() == ["errors", "0.010", "0.020", "-0.050", "0.060", "0.01", "120", "undecided"]
    assert lines[first + 3].split() == ["first_token", "0.400", "0.410", "1.150", "1.2", "118", "passed"]


@pytest.mark.slow
def test_status_shows_no_rollout_statistics_while_the_candidate_loads(status: Status) -> None:
    out = status(rollout=ROLLOUT | {"state": "loading", "canary": None, "signals": []}).out
    assert "rollout 3: tiny@2 -> tiny@3, loading for " in out
    assert "signal" not in out
    assert "rollout" not in status(rollout=None).out


@pytest.mark.slow
def test_json_status_contains_the_running_rollout(status: Status) -> None:
    assert json.loads(status("--json", rollout=ROLLOUT).out)["models"][0]["rollout"] == ROLLOUT


@pytest.mark.slow
def test_status_shows_all_served_and_refused_models(status: Status) -> None:
    out = status(pages=TWO_MODELS).out
    assert "tiny@2 (gptq)  previous: tiny@1 (gptq)" in out
    assert "other@7 (gptq)  previous: none" in out
    assert "large is not served: no memory for large@1" in out


OTHER = STATE | {"model": "other", "version": "other@7", "previous": None, "last_swap": None}
TWO_MODELS: dict[str, tuple[int, str]] = {
    "/svc/status": (
        200,
        json.dumps({"models": [STATE, OTHER], "refused": {"large": "no memory for large@1"}, "pid": 1}),
    ),
    "/metrics": (
        200,
        METRICS
        + """svc_request_errors_total{model="other",version="7",reason="engine_timeout"} 1
svc_request_errors_total{model="other",version="",reason="engine_unavailable"} 5
svc_requests_total{model="other",version="7",route="chat",status="200"} 12
""",
    ),
}


@pytest.mark.slow
def test_status_shows_only_the_named_model(status: Status) -> None:
    out = status("other", pages=TWO_MODELS).out
    assert "other@7 (gptq)  previous: none" in out
    assert "tiny@2" not in out
    assert "large" not in out
    assert "errors by reason: engine_timeout 1, engine_unavailable 5" in out


@pytest.mark.slow
def test_status_shows_several_named_models(status: Status) -> None:
    out = status("tiny", "other", pages=TWO_MODELS).out
    assert "tiny@2 (gptq)" in out
    assert "other@7 (gptq)" in out
    assert "large" not in out


@pytest.mark.slow
def test_json_status_contains_only_the_named_models(status: Status) -> None:
    output = json.loads(status("other", "--json", pages=TWO_MODELS).out)
    assert [model["version"] for model in output["models"]] == ["other@7"]
    assert output["refused"] == {}
    assert set(output["versions"]) == {"other@7"}
    assert output["errors"] == {"engine_timeout": 1, "engine_unavailable": 5}


def test_status_of_a_refused_model_shows_the_reason(status: Status) -> None:
    ended = status("large", pages=TWO_MODELS)
    assert ended.code == 0
    assert "large is not served: no memory for large@1" in ended.out
    assert "tiny@2" not in ended.out


@pytest.mark.parametrize("named", [("unserved",), ("tiny", "unserved"), ("tiny@2",)])
def test_error_for_an_unserved_model_lists_the_served_models(status: Status, named: tuple[str, ...]) -> None:
    ended = status(*named, pages=TWO_MODELS)
    assert ended.code == 8
    assert f"{named[-1]!r} is not served" in ended.err
    assert "tiny, other" in ended.err


@pytest.mark.slow
def test_status_shows_the_last_error_unchanged(status: Status) -> None:
    engine = {"state": "failed", "restarts": 4, "last_error": "vLLM [ended] with code 1"}
    out = status(engine=engine).out
    assert "engine failed" in out
    assert "last error: vLLM [ended] with code 1" in out


def test_status_command_without_a_running_server_says_how_to_start_one(svc: Svc) -> None:
    ended = svc("status")
    assert ended.code == 13
    assert "svc serve NAME" in ended.err


def test_status_fails_if_the_server_has_exited(svc: Svc, tmp_path: Path) -> None:
    with hold_lock(tmp_path / "home" / LOCK_FILE, "the home", url="http://127.0.0.1:9"):
        pass
    assert "no server is running for the home" in svc("--home", "home", "status").err


def test_status_fails_while_the_server_is_still_starting(svc: Svc, tmp_path: Path) -> None:
    with hold_lock(tmp_path / "home" / LOCK_FILE, "the home", url="http://127.0.0.1:9"):
        ended = svc("--home", "home", "status")
    assert ended.code == 13
    assert "http://127.0.0.1:9 is not responding" in ended.err


@pytest.mark.parametrize(
    ("pages", "wrong"),
    [
        ({"/svc/status": (500, "")}, "is not responding"),
        ({"/metrics": (404, "")}, "is not responding"),
        ({"/svc/status": (200, "<html>another server</html>")}, "returned status 200 with a body that is not JSON"),
        ({"/svc/status": (401, "<html>sign in</html>")}, "returned status 401 with a body that is not JSON"),
        ({"/metrics": (200, "<html>another server</html>")}, "returned status 200, but no valid metrics"),
    ],
    ids=str,
)
def test_unexpected_server_response_causes_no_traceback(
    status: Status, pages: dict[str, tuple[int, str]], wrong: str
) -> None:
    ended = status(pages=pages)
    assert ended.code == 13
    assert wrong in ended.err


def test_proxy_environment_variables_are_ignored(status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert status().code == 0


@pytest.mark.slow
def test_watch_option_refreshes_the_screen_with_rates(svc: Svc, tmp_path: Path) -> None:
    """The display continues until Ctrl-C, and waits if the server disappears."""
    looks = iter([METRICS, METRICS.replace('200"} 41', '200"} 51'), None])

    class Pages(dict[str, tuple[int, str]]):
        def __getitem__(self, path: str) -> tuple[int, str]:
            if path == "/svc/status":
                return 200, json.dumps(SERVER)
            page = next(looks, "stop")
            if page == "stop":
                os.kill(os.getpid(), signal.SIGINT)
            return (200, page) if page not in (None, "stop") else (503, "")

    with serving(Pages()) as url, hold_lock(tmp_path / "home" / LOCK_FILE, "the home", url=url):
        ended = svc("--home", "home", "status", "--watch", "--interval", "0.2")
    assert ended.code == 130
    assert "requests/s" in ended.out
    assert "is not responding" in ended.out


def test_watch_option_cannot_be_combined_with_the_json_option(svc: Svc) -> None:
    assert svc("status", "--watch", "--json").code == 2


@pytest.mark.slow
def test_watch_option_keeps_waiting_if_the_model_is_not_served(svc: Svc, tmp_path: Path) -> None:
    looks = iter([[], [STATE]])

    class Pages(dict[str, tuple[int, str]]):
        def __getitem__(self, path: str) -> tuple[int, str]:
            if path == "/metrics":
                return 200, METRICS
            models = next(looks, None)
            if models is None:
                os.kill(os.getpid(), signal.SIGINT)
            return 200, json.dumps(SERVER | {"models": models or []})

    with serving(Pages()) as url, hold_lock(tmp_path / "home" / LOCK_FILE, "the home", url=url):
        ended = svc("--home", "home", "status", "tiny", "--watch", "--interval", "0.2")
    assert ended.code == 130
    assert "'tiny' is not served" in ended.out
    assert "tiny@2 (gptq)" in ended.out
