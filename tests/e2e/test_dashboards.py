"""Tests that a real Prometheus, scraping a server under load, has data for all dashboard and alert queries."""

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from examples.load import Load
from examples.service import svc_json
from monitoring.drift.budget import Signal
from monitoring.exporter.versions import heldout_set
from svc.dataset.readers.reader import read_examples
from svc.store.database import open_database
from svc.store.tables import FeedbackRow, RequestRow
from tests.deploy.prometheus_rules import FOLDER, rules
from tests.docs.pages import ROOT
from tests.e2e.instance import ANY_QUALITY
from tests.e2e.server import HELDOUT_EXAMPLES, Server
from tests.monitoring.panel_queries import panel_queries
from trainer.data.fingerprint import fingerprint

pytestmark = [pytest.mark.slow]

MONITOR_PORT, PROMETHEUS_PORT = 8942, 8943
DASHBOARDS = ROOT / "monitoring" / "dashboards"
HELDOUT = ROOT / "examples" / "debian-triage" / "heldout.jsonl"
RATED = 115
"""Number of ratings. Without a previous version, the first 100 are the baseline for windows of ten or more."""
JUDGED = heldout_set(fingerprint(read_examples(HELDOUT)[:HELDOUT_EXAMPLES]), HELDOUT_EXAMPLES)
WHERE = {"job": ".*", "namespace": ".*", "instance": ".*"}
VARIABLES = WHERE | {"model": "tiny", "version_a": "1", "version_b": "2", "heldout": JUDGED, "datasource": "prometheus"}
# Rates over the complete test: on a slow machine the streams run minutes before the last panel is queried.
PANELS = panel_queries(DASHBOARDS, VARIABLES, rate_interval="15m", shown="15m")
LATE_RATIOS = (
    "svc_slow_first_tokens_per_first_tokens:ratio_increase30m",
    "svc_slow_token_gaps_per_token_gaps:ratio_increase30m",
    "svc_slow_answers_per_answers:ratio_increase6h",
)
"""These rules read other rules through subqueries, so they are the last to have values."""
_COMPARISON = re.compile(r" (==|!=|>=|<=|>|<) (?=[\d.])")


@dataclass(frozen=True)
class Watched:
    """A server under load, scraped by Prometheus.

    Attributes:
        load: requests sent while version 2 was promoted and rolled back.
        rated: id of a rated request, in addition to those of `RATED`.
        before: number of each version's answers requested by other tests.
    """

    server: Server
    prometheus: httpx.Client
    load: Load
    rated: str
    before: dict[str, float]

    def ask(self, query: str) -> list[dict[str, Any]]:
        """Return the current series of a Prometheus query.

        Raises:
            AssertionError: the query is invalid.
        """
        answer = self.prometheus.get("/api/v1/query", params={"query": in_short_steps(query)}).json()
        assert answer["status"] == "success", f"{answer.get('error')}: {query}"
        series: list[dict[str, Any]] = answer["data"]["result"]
        return series

    def faults(self, query: str, *, may_be_empty: bool = False, may_be_nan: bool = True) -> list[str]:
        """Return a text if a query is invalid, has no series or has only NaN."""
        try:
            series = self.ask(query)
        except AssertionError as invalid:
            return [str(invalid)]
        if not series:
            return [] if may_be_empty else [f"no data: {query}"]
        only_nan = all(math.isnan(float(one["value"][1])) for one in series)
        return [f"only NaN: {query}"] if only_nan and not may_be_nan else []

    def value(self, query: str) -> float:
        """Return the value of a query that yields a single series."""
        (series,) = self.ask(query)
        return float(series["value"][1])


def in_short_steps(expressions: str) -> str:
    """Let subqueries take a value every 5 s. With one value per full minute, they have none until a minute begins."""
    return expressions.replace(":1m]", ":5s]")


DID_NOT_HAPPEN = {
    "Time to wake an idle model",
    "Adapters",
    "Time to load an adapter",
    "Requests over key limits",
}
"""Panels for events that do not occur on this server: its model is never idle, and it is served merged and
in 4 bits to clients without a key."""


@contextmanager
def process(command: list[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Run a command while the context is active.

    Args:
        environment: additional environment variables.
    """
    variables = os.environ | dict(environment or {})
    with log.open("wb") as output:
        running = subprocess.Popen([str(part) for part in command], stdout=output, stderr=output, env=variables)
    try:
        yield
    finally:
        running.terminate()
        running.wait(30)


@pytest.fixture(scope="module")
def watched(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Run `svc monitor` and Prometheus as in deploy/, with other ports, a scrape every 1 s, a check every 2 s."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(folder / "rules" / "*.yml")]
    (folder / "rules").mkdir()
    for path in FOLDER.glob("rules/*.yml"):
        # Long windows are evaluated each second too.
        every_time = re.sub(r"^    interval: .*\n", "", path.read_text("utf-8"), flags=re.MULTILINE)
        (folder / "rules" / path.name).write_text(in_short_steps(every_time), "utf-8")
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{MONITOR_PORT}"]
    del config["alerting"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    svc = Path(sys.executable).with_name("svc")
    monitor: list[str | Path] = [svc, "--home", server.home, "monitor", "--port", str(MONITOR_PORT)]
    checks = {"SVC_MONITOR__DRIFT_EVERY_S": "2"}
    prometheus: list[str | Path] = [
        ROOT / ".venv" / "prometheus" / "bin" / "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}",
    ]
    with (
        process(monitor, folder / "monitor.log", checks),
        process(prometheus, folder / "prometheus.log"),
        httpx.Client(base_url=f"http://127.0.0.1:{PROMETHEUS_PORT}", trust_env=False) as client,
    ):
        _wait_for_target(client, folder)
        watched = _put_under_load(server, client)
        _wait_for_drift(watched, folder)
        for ratio in LATE_RATIOS:
            _wait_for_series(client, f"job_namespace_model:{ratio}")
        time.sleep(4)  # the last requests are scraped, and the rules have seen them
        yield watched


def _wait_for_series(client: httpx.Client, query: str, timeout_s: float = 60) -> None:
    """Wait until a query returns a series.

    Raises:
        TimeoutError: no series was returned in time.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            answer = client.get("/api/v1/query", params={"query": query}).json()
        except (httpx.HTTPError, ValueError):
            answer = {}
        if answer.get("data", {}).get("result"):
            return
        time.sleep(0.5)
    raise TimeoutError(f"nothing after {timeout_s} s: {query}")


def _wait_for_target(client: httpx.Client, folder: Path) -> None:
    """Wait for the first scrape of the monitor, which imports MLflow before it responds."""
    try:
        _wait_for_series(client, "svc_server_up == 1")
    except TimeoutError:
        logs = (folder / "monitor.log").read_text() + (folder / "prometheus.log").read_text()[-2000:]
        raise AssertionError(logs) from None


def _wait_for_drift(watched: Watched, folder: Path) -> None:
    """Wait until every signal of the served version has been compared and its held-out set has been run."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        compared = {series["metric"]["signal"] for series in watched.ask('svc_drift_score{version="1"}')}
        if compared == set(Signal) and watched.ask('svc_holdout_nll{version="1"}'):
            return
        time.sleep(0.5)
    raise AssertionError(f"compared: {compared or 'nothing'}\n{(folder / 'monitor.log').read_text()[-2000:]}")


def _put_under_load(server: Server, client: httpx.Client) -> Watched:
    answers = 'sum by (version) (svc_requests_total{model="tiny", status="200"})'
    counted = client.get("/api/v1/query", params={"query": answers}).json()["data"]["result"]
    before = {series["metric"]["version"]: float(series["value"][1]) for series in counted}
    with Load(server.url, "tiny", server.prompts) as load:
        load.wait_for(16)
        svc_json(server.home, "promote", "tiny@2", *ANY_QUALITY)
        _wait_for_series(client, 'svc_requests_total{version="2"}')
        load.wait_for(16)  # a new counter has no increase yet: panels show increases after its first scrape
        svc_json(server.home, "rollback", "tiny")
        load.wait_for(16)
        with pytest.raises(openai.NotFoundError):
            server.client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}])
        rated = _ask(server, server.prompts[0])
        for rating in ("good", "bad"):
            _rate(server, rated, rating, correction="mail a@b.de")
        load.wait_for(16)
    for index, example in enumerate(read_examples(HELDOUT)[:RATED]):
        asked = _ask(server, [message.as_dict() for message in example.prompt])
        _rate(server, asked, "bad" if index % 5 == 0 else "good")
    return Watched(server, client, load, rated, before)


def _ask(server: Server, messages: Any) -> str:
    """Send a request and return its id."""
    raw = server.client.chat.completions.with_raw_response.create(
        model="tiny", messages=messages, max_tokens=5, temperature=0
    )
    return raw.headers["x-request-id"]


def _rate(server: Server, request_id: str, rating: str, **more: str) -> None:
    given = {"request_id": request_id, "rating": rating, **more}
    httpx.post(f"{server.url}/v1/feedback", json=given).raise_for_status()


def test_every_dashboard_panel_has_data(watched: Watched) -> None:
    """Needs the real engine: many panels show metrics of vLLM itself, whose names change between its releases."""
    faults = []
    for query in PANELS:
        # An annotation has data only at the moment of a change.
        exempt = query.panel.startswith("annotation") or query.panel in DID_NOT_HAPPEN
        found = watched.faults(query.expr, may_be_empty=exempt, may_be_nan=exempt)
        faults += [f"{query.dashboard}: {query.panel}: {fault}" for fault in found]
    assert PANELS and faults == []


def test_every_recording_rule_has_data(watched: Watched) -> None:
    faults, recorded = [], rules("record")
    for rule in recorded:
        faults += watched.faults(rule["expr"])
        faults += watched.faults(rule["record"])  # Prometheus has recorded it
    assert recorded and faults == []


NOT_HERE = re.compile(r"svc_(certificate|key|backup)_|svc_training_|DCGM_")
"""Series that this server does not have, because it has no certificate, keys, backup, training run or GPU."""


def test_every_alert_expression_reads_existing_data(watched: Watched) -> None:
    """With `bool`, a false comparison gives 0 instead of nothing, so an empty result means missing data.

    An exception after `unless` becomes an alternative, because with `bool` it would remove everything.
    A subquery of full hours reads every scrape here, since this Prometheus is less than an hour old.
    """
    faults, alerts = [], rules("alert")
    for rule in alerts:
        expression = re.sub(r"\bunless\b", "or", rule["expr"]).replace(":1h]", ":15s]")
        expression, comparisons = _COMPARISON.subn(r" \1 bool ", expression)
        found = watched.faults(expression, may_be_empty=NOT_HERE.search(expression) is not None)
        faults += [f"{rule['alert']}: {fault}" for fault in found]
        faults += [] if comparisons else [f"{rule['alert']}: no comparison: {expression}"]
    assert alerts and faults == []


def test_prometheus_evaluates_all_rules_without_errors(watched: Watched) -> None:
    groups = watched.prometheus.get("/api/v1/rules").json()["data"]["groups"]
    states = [(rule["health"], rule.get("lastError")) for group in groups for rule in group["rules"]]
    assert states == [("ok", None)] * (len(rules("record")) + len(rules("alert")))


def test_request_counts_in_prometheus_match_the_clients_counts(watched: Watched) -> None:
    for version in ("1", "2"):
        got = sum(answer.version == f"tiny@{version}" for answer in watched.load.answers)
        counted = watched.value(f'sum(svc_requests_total{{model="tiny", version="{version}", status="200"}})')
        extra = 1 + RATED if version == "1" else 0  # the rated requests
        assert counted - watched.before.get(version, 0) == got + extra


def test_request_counters_equal_the_number_of_requests_in_the_database(watched: Watched) -> None:
    columns = (RequestRow.number, RequestRow.status, RequestRow.outcome)
    rows = select(*columns, func.count()).group_by(*columns)
    with Session(open_database(watched.server.home)) as session:
        kept = {(str(number or ""), str(status), how): count for number, status, how, count in session.execute(rows)}
    labels = ("version", "status", "outcome")
    counted = {
        tuple(series["metric"].get(label, "") for label in labels): float(series["value"][1])
        for series in watched.ask("sum by (version, status, outcome) (svc_requests_total)")
    }
    assert kept == counted
    assert watched.value("sum(svc_request_log_dropped_total)") == 0


def test_rated_request_is_stored_with_its_content_and_a_redacted_correction(watched: Watched) -> None:
    with Session(open_database(watched.server.home)) as session:
        row = session.scalars(select(RequestRow).where(RequestRow.request_id == watched.rated)).one()
        feedback = session.get_one(FeedbackRow, row.id)
    assert row.prompt
    assert row.answer
    assert row.tokens_out == 5
    assert (feedback.rating, feedback.correction) == ("bad", "mail [mail]")


def test_metric_exemplars_point_to_stored_requests(watched: Watched) -> None:
    answer = watched.prometheus.get(
        f"http://127.0.0.1:{MONITOR_PORT}/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"}
    )
    ids = set(re.findall(r'# \{request_id="([^"]+)"\}', answer.text))
    with Session(open_database(watched.server.home)) as session:
        known = set(session.scalars(select(RequestRow.request_id).where(RequestRow.request_id.in_(ids))))
    assert ids
    assert known == ids


def test_latency_percentiles_match_the_stored_requests(watched: Watched) -> None:
    """Both percentiles must agree within the sketch's 1%, at rank q(n-1) of the stored rows, rounded down."""
    answered = select(RequestRow.seconds).where(RequestRow.number == 1, RequestRow.status < 400)
    with Session(open_database(watched.server.home)) as session:
        seconds = sorted(session.scalars(answered))
    for quantile in ("0.5", "0.95", "0.99"):
        exact = seconds[int(float(quantile) * (len(seconds) - 1))]
        shown = watched.value(f'svc_request_duration_quantile_seconds{{version="1", quantile="{quantile}"}}')
        assert shown == pytest.approx(exact, rel=0.01)
