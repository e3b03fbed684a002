"""Tests that Grafana can read the dashboards, and that they query only metrics that exist."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import ProcessCollector

from monitoring.status.figures import SERVER_FAULTS
from tests.command_line import Svc
from tests.deploy.prometheus_rules import rules
from tests.monitoring.panel_queries import PanelQuery, panel_queries

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "monitoring" / "dashboards"
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "rules"
PROMTOOL = ROOT / ".venv" / "prometheus" / "bin" / "promtool"
VLLM_LOGGERS = "vllm/v1/metrics/loggers.py"

TEXTS = {path.name: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.json"))}
DASHBOARDS: dict[str, dict[str, Any]] = {name: json.loads(text) for name, text in TEXTS.items()}
PANELS = [
    (f"{name}: {panel['title']}", panel)
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    if panel["type"] != "row"
]
WHERE = {"job": ".*", "namespace": ".*", "instance": ".*"}
QUERIES = panel_queries(
    FOLDER, {**WHERE, "model": "tiny", "version_a": "1", "version_b": "2", "heldout": "0123456789ab:4"}
)
DATASOURCES = [{"type": "prometheus", "uid": uid} for uid in ("$datasource", "${datasource}")]
METRIC = re.compile(r"(?<![\w:])(?:svc|vllm|process)[_:]\w+")
SUFFIX = re.compile(r"_(bucket|sum|count)$")
NO_METRIC = re.compile(
    r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|without|on|ignoring) ?\([^)]*\)|\b(?:and|or|unless|offset|bool)\b"
)
IDENTIFIER = re.compile(r"(?<![\w:.])[A-Za-z_:][\w:]*\b(?! *\()")

# Documented metrics that need no panel, each with the reason.
NOT_SHOWN: dict[str, str] = {}
PAGE = (ROOT / "docs" / "metrics.md").read_text("utf-8")
DOCUMENTED = set(re.findall(r"^\| `(svc_\w+)` \|", PAGE, re.MULTILINE))
OF_EACH_MODEL = set(re.findall(r"^\| `(svc_\w+)` \| \w+ \| model\b", PAGE, re.MULTILINE))
SELECTOR = re.compile(METRIC.pattern + r"(?:\{[^}]*\})?")
ADDED_UP = re.compile(r"\b(?:sum|min|max|avg|count) (?:by \(([^)]*)\))?")


def _names(expr: str) -> set[str]:
    """Return the metrics and recorded series that a query reads, with series suffixes of histograms removed."""
    names = {*METRIC.findall(expr), *IDENTIFIER.findall(NO_METRIC.sub(" ", expr))}
    return {SUFFIX.sub("", name) for name in names}


def _vllm_names() -> set[str]:
    """Return the metric names in vLLM's loggers, with the suffix that the client library adds to counters."""
    path = next(Path(entry) / VLLM_LOGGERS for entry in sys.path if (Path(entry) / VLLM_LOGGERS).is_file())
    made = re.findall(r'self\._(counter|gauge|histogram)_cls\(\s*name="(vllm:\w+)"', path.read_text("utf-8"))
    return {name + "_total" if kind == "counter" else name for kind, name in made}


def _file_faults(name: str) -> Iterator[str]:
    dashboard, stem = DASHBOARDS[name], name.removesuffix(".json")
    if TEXTS[name] != json.dumps(dashboard, indent=2, sort_keys=True) + "\n":
        yield "not formatted; run python -m json.tool --sort-keys --indent 2 FILE FILE"
    if dashboard.get("id") is not None or "__inputs" in dashboard:
        yield "belongs to one Grafana: remove id, export without `sharing externally`"
    if dashboard["uid"] != f"tuneserve-{stem}":
        yield f"the uid is {dashboard['uid']}, not tuneserve-{stem}"
    others = {f"/d/tuneserve-{other.removesuffix('.json')}" for other in DASHBOARDS if other != name}
    if {link["url"] for link in dashboard["links"]} != others:
        yield "links do not lead to each other dashboard"
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    if (variables["datasource"]["type"], variables["datasource"]["query"]) != ("datasource", "prometheus"):
        yield "$datasource is not a choice of Prometheus data sources"
    annotations = [annotation for annotation in dashboard["annotations"]["list"] if not annotation.get("builtIn")]
    for asked in (*variables.values(), *annotations):
        if asked.get("type") != "datasource" and asked["datasource"] not in DATASOURCES:
            yield f"{asked['name']}: does not ask $datasource"


def _panel_faults(panel: dict[str, Any]) -> Iterator[str]:
    targets, defaults = panel["targets"], panel["fieldConfig"]["defaults"]
    if not panel["title"] or not panel["description"].endswith("."):
        yield "no title, or no sentence that says what the panel shows"
    if not defaults.get("unit") or not defaults.get("thresholds", {}).get("steps"):
        yield "no unit, or no thresholds"
    if not targets or not all(target["legendFormat"] for target in targets):
        yield "no series, or a series without a name"
    if any(asked["datasource"] not in DATASOURCES for asked in [panel, *targets]):
        yield "does not ask $datasource"


def _layout_faults(name: str) -> Iterator[str]:
    ids: set[int] = set()
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARDS[name]["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        if cells & taken or at["x"] + at["w"] > 24:
            yield f"{panel['title']}: lies over another panel or beyond the right edge"
        if panel["id"] in ids:
            yield f"{panel['title']}: id {panel['id']} is used twice"
        if panel.get("panels"):
            yield f"{panel['title']}: a collapsed row, whose panels are not checked; expand it"
        taken |= cells
        ids.add(panel["id"])


def test_every_dashboard_is_valid_including_its_layout_and_panels() -> None:
    faults = [f"{name}: {fault}" for name in DASHBOARDS for fault in (*_file_faults(name), *_layout_faults(name))]
    faults += [f"{title}: {fault}" for title, panel in PANELS for fault in _panel_faults(panel)]
    assert len(DASHBOARDS) == 5
    assert not faults, "\n".join(faults)


def test_dashboards_command_writes_world_readable_files_and_prints_their_paths(svc: Svc, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    ended = svc("dashboards", "--out", out)
    assert ended.code == 0
    assert {Path(line) for line in ended.out.splitlines()} == {out / name for name in TEXTS}
    assert {path.name: path.read_text("utf-8") for path in out.iterdir()} == TEXTS
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}


def test_dashboards_command_prints_the_paths_as_json(svc: Svc, tmp_path: Path) -> None:
    ended = svc("dashboards", "--json", "--out", tmp_path)
    assert json.loads(ended.out) == {"dashboards": [str(tmp_path / name) for name in TEXTS]}


def _of_models(expr: str) -> list[str]:
    """Return the selectors in a query whose metrics exist for each model."""
    selectors = []
    for selector in SELECTOR.findall(expr):
        metric = SUFFIX.sub("", selector.partition("{")[0])
        if metric in OF_EACH_MODEL or metric.startswith("vllm:"):
            selectors.append(selector)
    return selectors


def _model_faults(panel: dict[str, Any]) -> Iterator[str]:
    for target in panel["targets"]:
        selectors = _of_models(target["expr"])
        yield from (f"{selector} is of all models" for selector in selectors if "$model" not in selector)
        if any('model=~"$model"' in selector for selector in selectors):
            if any("model" not in labels.split(", ") for labels in ADDED_UP.findall(target["expr"])):
                yield f"adds models up: {target['expr']}"
            if panel["type"] != "table" and "{{model}}" not in target["legendFormat"]:
                yield f"a line without its model: {target['legendFormat']}"


def test_queries_on_metrics_with_a_model_label_are_filtered_and_grouped_by_model() -> None:
    faults = [f"{title}: {fault}" for title, panel in PANELS for fault in _model_faults(panel)]
    assert not faults, "\n".join(faults)


def test_every_dashboard_query_selects_the_chosen_job_and_namespace() -> None:
    selector = re.compile(r"(?<![\w:\"])((?:svc|vllm|process)[_:]\w+|job_namespace[\w:]+)(\{[^}]*\})?(?![\w(])")
    chosen = 'job=~"$job", namespace=~"$namespace"'
    faults = [
        f"{title}: {name} of every namespace"
        for title, panel in PANELS
        for target in panel["targets"]
        for name, labels in selector.findall(target["expr"])
        if chosen not in labels
    ]
    assert not faults, "\n".join(faults)


def test_every_metric_in_a_dashboard_query_exists() -> None:
    process = {sample.name for family in ProcessCollector(registry=None).collect() for sample in family.samples}
    known = DOCUMENTED | _vllm_names() | {rule["record"] for rule in rules("record")} | process
    faults = [
        f"{query.dashboard}: {query.panel}: {name} does not exist"
        for query in QUERIES
        for name in sorted(_names(query.expr) - known)
    ]
    assert not faults, "\n".join(faults)


def test_every_documented_metric_is_shown_on_a_dashboard() -> None:
    in_rules = set().union(*(_names(path.read_text("utf-8")) for path in RULES.glob("*.yml")))
    shown = set().union(*(_names(query.expr) for query in QUERIES))
    assert DOCUMENTED - shown - in_rules == set(NOT_SHOWN)


def test_dashboards_and_prometheus_rules_define_server_faults_and_objectives_identically() -> None:
    recording = (RULES / "recording.yml").read_text("utf-8")
    faults = re.compile(r'svc_request_errors_total\{[^}]*\breason=~"(.+?)"')
    assert set(faults.findall(recording)) == {SERVER_FAULTS}
    assert {reasons for query in QUERIES for reasons in faults.findall(query.expr)} == {SERVER_FAULTS}
    (availability,), (first_token,) = (
        {
            p["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"]
            for at, p in PANELS
            if at == f"overview.json: {title}"
        }
        for title in ("Availability", "First tokens on time")
    )
    (budget,) = [query.expr for query in QUERIES if query.panel == "Error budget left"]
    assert float(budget.rpartition(" / ")[2]) == round(1 - availability, 9)
    assert f"{availability * 100:g}% of requests without a fault" in " ".join(recording.split())
    assert f"{first_token * 100:g}% of streamed answers" in " ".join(recording.split())


def test_scrape_interval_in_grafana_matches_prometheus() -> None:
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text("utf-8"))
    prometheus = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text("utf-8"))
    interval = source["datasources"][0]["jsonData"]["timeInterval"]
    assert interval == prometheus["global"]["scrape_interval"]


def test_drift_panels_show_negative_changes_and_small_p_values() -> None:
    axes = {title: panel["fieldConfig"]["defaults"] for title, panel in PANELS if title.startswith("drift.json")}
    assert [title for title in axes if title.startswith("drift.json: Change of") and "min" in axes[title]] == []
    pvalues = [axis for title, axis in axes.items() if title.startswith("drift.json: p-value of")]
    assert pvalues
    assert all(axis["custom"]["scaleDistribution"] == {"type": "log", "log": 10} for axis in pvalues)


@pytest.mark.slow
def test_every_dashboard_query_is_valid_promql(tmp_path: Path) -> None:
    recorded = [{"record": f"query:{index}", "expr": query.expr} for index, query in enumerate(QUERIES)]
    page = tmp_path / "rules.yml"
    page.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": recorded}]}), "utf-8")
    checked = subprocess.run([PROMTOOL, "check", "rules", page], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_dashboard_queries_are_found_even_after_grafana_rewrites_the_file(tmp_path: Path) -> None:
    dashboard = {
        "panels": [{"title": "A", "targets": [{"expr": 'a{model=~"${model}"}'}]}],
        "templating": {"list": [{"type": "query", "name": "model", "query": {"query": "label_values(a, model)"}}]},
        "annotations": {"list": [{"name": "Annotations & Alerts", "builtIn": 1}, {"name": "B", "expr": "b"}]},
    }
    (tmp_path / "x.json").write_text(json.dumps(dashboard), "utf-8")
    queries = panel_queries(tmp_path, {"model": "tiny"})
    assert queries == [
        PanelQuery("x", "A", 'a{model=~"tiny"}'),
        PanelQuery("x", "variable model", "count by (model) (a)"),
        PanelQuery("x", "annotation B", "b"),
    ]
