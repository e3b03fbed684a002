"""The committed dashboards are those of the code, and ask only for metrics that exist."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from monitoring.dashboards.export import files
from monitoring.dashboards.overview import AVAILABILITY_OBJECTIVE, FIRST_TOKEN_OBJECTIVE
from monitoring.dashboards.promql import mean, quantile, rate, share
from monitoring.faults import SERVER_FAULTS
from tests.command_line import Svc
from tests.deploy.prometheus_rules import metrics, rules
from tests.monitoring.panel_queries import PanelQuery, panel_queries

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "grafana" / "dashboards"
RULES = ROOT / "deploy" / "prometheus" / "rules"
PROMTOOL = ROOT / ".venv" / "prometheus" / "bin" / "promtool"
VLLM_LOGGERS = "vllm/v1/metrics/loggers.py"

NAMES = list(files())
QUERIES = panel_queries(FOLDER, {"model": "tiny", "version_a": "1", "version_b": "2", "heldout": "0123456789ab:4"})
METRIC = re.compile(r"(?<![\w:])(?:svc|vllm|process)[_:]\w+")
SUFFIX = re.compile(r"_(bucket|sum|count)$")

# Documented metrics that nobody needs to look at, each with the reason.
NOT_SHOWN: dict[str, str] = {}
PAGE = (ROOT / "docs" / "metrics.md").read_text("utf-8")
DOCUMENTED = set(re.findall(r"^\| `(svc_\w+)` \|", PAGE, re.MULTILINE))
OF_EACH_MODEL = set(re.findall(r"^\| `(svc_\w+)` \| \w+ \| model\b", PAGE, re.MULTILINE))
SELECTOR = re.compile(METRIC.pattern + r"(?:\{[^}]*\})?")
ADDED_UP = re.compile(r"\b(?:sum|min|max|avg|count) (?:by \(([^)]*)\))?")


def _panels(name: str) -> list[dict[str, Any]]:
    return [panel for panel in json.loads(files()[name])["panels"] if panel["type"] != "row"]


def _asked(prefix: str) -> set[str]:
    """The metrics in all queries, histograms without the suffix of their series."""
    names = {name for query in QUERIES for name in METRIC.findall(query.expr) if name.startswith(prefix)}
    return {SUFFIX.sub("", name) for name in names}


def _vllm_names() -> set[str]:
    """What vLLM's loggers name, with the suffix that the client library gives to counters."""
    path = next(Path(entry) / VLLM_LOGGERS for entry in sys.path if (Path(entry) / VLLM_LOGGERS).is_file())
    made = re.findall(r'self\._(counter|gauge|histogram)_cls\(\s*name="(vllm:\w+)"', path.read_text("utf-8"))
    return {name + "_total" if kind == "counter" else name for kind, name in made}


def _changed(ours: Any, read: Any, path: str = "") -> list[str]:
    """Where what Grafana's types read differs from what was written; defaults that they add are no difference."""
    if isinstance(ours, dict) and isinstance(read, dict):
        return [at for key, value in ours.items() for at in _changed(value, read.get(key, KeyError), f"{path}/{key}")]
    if isinstance(ours, list) and isinstance(read, list) and len(ours) == len(read):
        pairs = zip(ours, read, strict=True)
        return [at for place, (one, other) in enumerate(pairs) for at in _changed(one, other, f"{path}/{place}")]
    return [] if ours == read else [path]


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_a_dashboard_is_one_of_grafanas_schema(name: str) -> None:
    """The SDK's types are made from that schema, and drop what it does not know."""
    register_default_plugins()
    ours = json.loads((FOLDER / name).read_text("utf-8"))
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(ours)))
    assert _changed(ours, read) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_dashboard_is_current(name: str) -> None:
    assert (FOLDER / name).read_text("utf-8") == files()[name], "run `svc dashboards`"


def test_no_other_dashboard_is_committed() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(NAMES)


def test_the_command_writes_them_and_says_where(svc: Svc, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    ended = svc("dashboards", "--out", out)
    assert ended.code == 0
    assert {Path(line) for line in ended.out.splitlines()} == {out / name for name in NAMES}
    assert {path.name: path.read_text("utf-8") for path in out.iterdir()} == files()


def test_the_command_tells_machines_where(svc: Svc, tmp_path: Path) -> None:
    ended = svc("dashboards", "--json", "--out", tmp_path)
    assert json.loads(ended.out) == {"dashboards": [str(tmp_path / name) for name in NAMES]}


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_says_what_it_shows(name: str) -> None:
    assert len(_panels(name)) > 0
    for panel in _panels(name):
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"], panel["title"]


@pytest.mark.parametrize("name", NAMES)
def test_every_series_has_a_name(name: str) -> None:
    for panel in _panels(name):
        assert panel["targets"] and all(target["legendFormat"] for target in panel["targets"]), panel["title"]


def _of_models(expr: str) -> list[str]:
    """The selectors of metrics that each model has."""
    found = []
    for selector in SELECTOR.findall(expr):
        metric = SUFFIX.sub("", selector.partition("{")[0])
        if metric in OF_EACH_MODEL or metric.startswith("vllm:"):
            found.append(selector)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_each_model_has_is_shown_of_the_chosen_ones_alone(name: str) -> None:
    dashboard = json.loads(files()[name])
    asked = [(panel["title"], target["expr"]) for panel in _panels(name) for target in panel["targets"]]
    asked += [(annotation["name"], annotation["expr"]) for annotation in dashboard["annotations"]["list"]]
    assert [(title, one) for title, expr in asked for one in _of_models(expr) if '"$model"' not in one] == []


@pytest.mark.parametrize("name", NAMES)
def test_models_are_not_added_up_and_every_line_names_its_own(name: str) -> None:
    for panel in _panels(name):
        for target in panel["targets"]:
            if any('model=~"$model"' in selector for selector in _of_models(target["expr"])):
                by = ADDED_UP.findall(target["expr"])
                assert [labels for labels in by if "model" not in labels.split(", ")] == [], panel["title"]
                assert panel["type"] == "table" or "{{model}}" in target["legendFormat"], panel["title"]


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_asks_the_chosen_prometheus(name: str) -> None:
    chosen = {"type": "prometheus", "uid": "$datasource"}
    for panel in _panels(name):
        assert all(asked["datasource"] == chosen for asked in [panel, *panel["targets"]]), panel["title"]


@pytest.mark.parametrize("name", NAMES)
def test_no_panel_lies_over_another(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(files()[name])["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_panels_are_unique(name: str) -> None:
    ids = [panel["id"] for panel in json.loads(files()[name])["panels"]]
    assert len(set(ids)) == len(ids)


def test_addresses_are_unique_and_those_that_links_lead_to() -> None:
    made = [json.loads(text) for text in files().values()]
    addresses = [dashboard["uid"] for dashboard in made]
    assert len(set(addresses)) == len(addresses)
    for dashboard in made:
        others = {f"/d/{uid}" for uid in addresses if uid != dashboard["uid"]}
        assert {link["url"] for link in dashboard["links"]} == others


def test_every_metric_of_ours_is_documented() -> None:
    assert _asked("svc_") - DOCUMENTED == set()


def test_every_metric_of_the_engine_exists() -> None:
    assert _asked("vllm:") - _vllm_names() == set()


def test_every_recorded_series_is_recorded() -> None:
    asked = {name for query in QUERIES for name in metrics(query.expr) if name.startswith("job")}
    assert asked
    assert asked <= {rule["record"] for rule in rules("record")}


def test_every_documented_metric_is_looked_at() -> None:
    text = "".join(path.read_text("utf-8") for path in RULES.glob("*.yml"))
    in_rules = {SUFFIX.sub("", name) for name in METRIC.findall(text)}
    assert DOCUMENTED - _asked("svc_") - in_rules == set(NOT_SHOWN)


def test_objectives_are_those_of_the_rules() -> None:
    recording = (RULES / "recording.yml").read_text("utf-8")
    assert set(re.findall(r'svc_request_errors_total\{reason=~"(.+?)"\}', recording)) == {SERVER_FAULTS}
    assert f"{AVAILABILITY_OBJECTIVE * 100:g} % of requests without a fault" in " ".join(recording.split())
    assert f"{FIRST_TOKEN_OBJECTIVE * 100:g} % of streamed answers" in " ".join(recording.split())


def test_rates_are_made_of_the_scrapes_that_prometheus_makes() -> None:
    source = yaml.safe_load((FOLDER.parent / "provisioning/datasources/prometheus.yml").read_text("utf-8"))
    prometheus = yaml.safe_load((RULES.parent / "prometheus.yml").read_text("utf-8"))
    interval = source["datasources"][0]["jsonData"]["timeInterval"]
    assert interval == prometheus["global"]["scrape_interval"]


def test_a_change_below_zero_and_a_p_value_are_seen() -> None:
    axes = {panel["title"]: panel["fieldConfig"]["defaults"] for panel in _panels("drift.json")}
    assert [title for title in axes if title.startswith("Change of") and "min" in axes[title]] == []
    surprises = [axis for title, axis in axes.items() if title.startswith("Surprise of")]
    assert surprises
    assert all(axis["custom"]["scaleDistribution"] == {"type": "log", "log": 10} for axis in surprises)


def test_the_command_needs_no_heavy_library() -> None:
    code = "import sys, monitoring.dashboards.export; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert {"torch", "mlflow", "vllm", "transformers"} & set(loaded.split()) == set()


def test_the_help_does_not_load_the_dashboards() -> None:
    code = "import sys, monitoring.dashboards.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "grafana_foundation_sdk" not in loaded.split()


def test_every_query_is_promql(tmp_path: Path) -> None:
    recorded = [{"record": f"query:{index}", "expr": query.expr} for index, query in enumerate(QUERIES)]
    page = tmp_path / "rules.yml"
    page.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": recorded}]}), "utf-8")
    checked = subprocess.run([PROMTOOL, "check", "rules", page], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_variables_are_replaced_in_queries() -> None:
    assert [query for query in QUERIES if "$" in query.expr] == []


def test_queries_are_those_of_panels_variables_and_annotations() -> None:
    info, queued = (f'{metric}{{model=~"tiny"}}' for metric in ("svc_model_version_info", "svc_requests_queued"))
    change = f"{info} unless {info} offset 1m"
    assert PanelQuery("overview", "Requests running and queued", queued) in QUERIES
    assert PanelQuery("overview", "variable model", "count by (model) (svc_requests_running)") in QUERIES
    assert PanelQuery("overview", "annotation Version changes", change) in QUERIES


def test_a_rate_is_added_up_by_its_labels() -> None:
    assert rate("a_total", "x", "y") == "sum by (x, y) (rate(a_total[$__rate_interval]))"
    assert rate("a_total") == "sum (rate(a_total[$__rate_interval]))"


def test_a_histogram_is_asked_for_the_series_that_it_has() -> None:
    assert quantile(0.5, 'a{x="1"}', "y") == (
        'histogram_quantile(0.5, sum by (le, y) (rate(a_bucket{x="1"}[$__rate_interval])))'
    )
    assert (
        mean('a{x="1"}') == 'sum (rate(a_sum{x="1"}[$__rate_interval])) / sum (rate(a_count{x="1"}[$__rate_interval]))'
    )


def test_a_share_without_a_part_is_zero() -> None:
    assert share("sum by (x) (part)", "sum by (x) (whole)") == (
        "(sum by (x) (part) or 0 * sum by (x) (whole)) / sum by (x) (whole)"
    )
