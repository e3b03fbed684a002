"""Tests what dashboards show of two servers that serve the same models."""

import json
import re
from pathlib import Path

import pytest

from tests.monitoring.panel_queries import panel_queries
from tests.monitoring.promtool import case, run_cases

FOLDER = Path(__file__).parents[2] / "monitoring" / "dashboards"
QUERIES = panel_queries(
    FOLDER,
    {
        **dict.fromkeys(("job", "namespace", "instance", "model"), ".*"),
        "version_a": "1",
        "version_b": "2",
        "heldout": "0123456789ab:4",
    },
)
# Series of the store, which are the same on each server's page, or of a home's own training runs.
SHARED = re.compile(r"^(clamp_min\()?(svc_drift|svc_holdout|svc_training|job_namespace_instance)\w*[:\w]*")
_OUTCOME = {"svc_holdout_run_timestamp_seconds": ',outcome="completed"'}


def query(panel: str, metric: str) -> str:
    """Return a panel's query on a metric, with its variables replaced."""
    (found,) = {query.expr for query in QUERIES if query.panel == panel and metric in query.expr}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("panel", "metric", "labels", "values", "shown"),
    [
        ("Served version", "svc_model_version_info", 'model="m",version="1",format="gptq"', (1, 1), 1),
        ("Serving", "svc_model_version_info", 'model="m",version="1",format="gptq"', (1, 1), 1),
        ("Size", "svc_registry_version_size_bytes", 'model="m",version="1",format="gptq"', (5, 5), 5),
        ("Engine", "svc_engine_state", 'model="m",state="ready"', (1, 0), 0),
        ("Engine state", "svc_engine_state", 'model="m",state="failed"', (1, 0), 1),
        ("Requests running and queued", "svc_requests_running", 'model="m"', (3, 4), 7),
        ("Response time", "svc_request_duration_quantile_seconds", 'model="m",version="1",quantile="0.95"', (3, 4), 4),
        ("Unverified versions", "svc_versions_unverified", 'model="m"', (1, 0), 1),
        ("Next run", "svc_holdout", 'model="m",version="1"', (2, 2), 4000),
    ],
)
def test_panel_aggregates_two_servers_without_hiding_a_fault(
    tmp_path: Path, panel: str, metric: str, labels: str, values: tuple[float, float], shown: float
) -> None:
    expr = query(panel, metric)
    names = set(re.findall(r"svc_\w+", expr))
    series = {
        f'{name}{{instance="{instance}",{labels}{_OUTCOME.get(name, "")}}}': f"{value}x60"
        for name in names
        for instance, value in zip("ab", values, strict=True)
    }
    by = re.search(r"by \(([^)]*)\)", expr)
    assert by is not None
    grouped = by[1].split(", ")
    expected = ",".join(label for label in labels.split(",") if label.split("=")[0] in grouped)
    run_cases(tmp_path, [case(expr, series, {f"{{{expected}}}": shown})])


def test_every_panel_line_is_aggregated_over_servers_or_names_its_server() -> None:
    faults = []
    for path in sorted(FOLDER.glob("*.json")):
        for panel in json.loads(path.read_text("utf-8"))["panels"]:
            for target in panel.get("targets", []):
                expr, name = target["expr"], target["legendFormat"]
                grouped = re.match(r"[^{]*\b(sum|min|max|histogram_quantile)\b", expr)
                if not grouped and "{{instance}}" not in name and not SHARED.match(expr) and panel["title"] != "Build":
                    faults.append(f"{path.stem}: {panel['title']}: {name}: {expr}")
    assert not faults, "\n".join(faults)
