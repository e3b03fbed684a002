"""The rules read only exported series: Prometheus treats a misspelt name as a series without samples."""

import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from serving.telemetry.metrics import _BETWEEN_TOKENS_BUCKETS_S, _DURATION_BUCKETS_S, _FIRST_TOKEN_BUCKETS_S
from tests.deploy.prometheus_rules import grouped_by, groups, matchers, metrics, rules, seconds
from tests.docs.pages import read, rows

PAGE = read("docs/metrics.md")
EXPORTED = {
    name: (kind, {label.strip() for label in labels.split(",") if label.strip()})
    for name, kind, labels in re.findall(r"^\| `(svc_\w+)` \| (\w+) \|([\w, ]*)\|", PAGE, re.MULTILINE)
}
RECORDED = {rule["record"] for rule in rules("record")}
SCRAPED = {"job", "namespace", "instance"}  # added by Prometheus
ENGINE = {"model", "version", "replica"}  # added by the server to vLLM's metrics
RULES = [pytest.param(rule, id=rule.get("alert") or rule["record"]) for rule in rules("alert") + rules("record")]


def _family(series: str) -> str:
    """Return the metric of a series; a histogram's buckets are separate series."""
    base = re.sub(r"_(bucket|count|sum)$", "", series)
    return base if EXPORTED.get(base, ("", set()))[0] == "histogram" else series


def _labels(name: str) -> set[str]:
    """Return the labels of an exported metric, or those at the start of a recorded one's name."""
    if name in RECORDED:
        return set(name.partition(":")[0].split("_"))
    _, labels = EXPORTED[_family(name)]
    return labels | SCRAPED | ({"le"} if name.endswith("_bucket") else set())


@pytest.mark.parametrize("rule", RULES)
def test_every_metric_that_a_rule_reads_is_exported_or_recorded(rule: dict[str, Any]) -> None:
    assert {_family(name) for name in metrics(rule["expr"])} <= set(EXPORTED) | RECORDED


@pytest.mark.parametrize("rule", RULES)
def test_every_label_that_a_rule_reads_exists(rule: dict[str, Any]) -> None:
    known = {name: _labels(name) for name in metrics(rule["expr"])}
    assert not [(name, label) for name, label, _ in matchers(rule["expr"]) if label not in known[name]]
    engine = ENGINE if "vllm:" in rule["expr"] else set()
    assert grouped_by(rule["expr"]) <= SCRAPED.union(engine, *known.values())


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule["alert"]) for rule in rules("alert")])
def test_an_alert_on_a_metric_per_model_has_the_label_model(rule: dict[str, Any]) -> None:
    names = metrics(rule["expr"])
    if names and all("model" in _labels(name) for name in names):
        assert "{{ $labels.model }}" in rule["annotations"]["description"]
        assert not [by for by in re.findall(r"\bby \(([^)]*)\)", rule["expr"]) if "model" not in by]


@pytest.mark.parametrize("rule", RULES)
def test_an_aggregation_keeps_job_and_namespace(rule: dict[str, Any]) -> None:
    kept = [set(re.split(r", ?", labels)) for labels in re.findall(r"\bby \(([^)]*)\)", rule["expr"])]
    assert not [labels for labels in kept if not {"job", "namespace"} <= labels]


@pytest.mark.parametrize("rule", RULES)
def test_every_value_that_a_rule_selects_is_documented(rule: dict[str, Any]) -> None:
    values = re.findall(r"`(\w+)`", PAGE)
    selected = [text for _, label, text in matchers(rule["expr"]) if label not in SCRAPED | {"le"}]
    patterns = [pattern for text in selected for pattern in text.split("|")]
    assert not [pattern for pattern in patterns if not any(re.fullmatch(pattern, value) for value in values)]


def test_a_fault_of_the_server_has_status_429_or_5xx_except_for_a_keys_own_limit() -> None:
    faults = {reason.strip("`") for reason, status, _ in rows(PAGE, "reason | status") if re.match(r"429|5", status)}
    faults -= {"rate_limit_exceeded"}
    reasons = {reason.strip("`") for reason, *_ in rows(PAGE, "reason | status")}
    selections = [
        {reason for reason in reasons if re.fullmatch(pattern, reason)}
        for rule in rules("record")
        if rule["record"].startswith("job_namespace_model:svc_request_faults:")
        for _, label, pattern in matchers(rule["expr"])
        if label == "reason"
    ]
    assert selections
    assert all(selected == faults for selected in selections)


@pytest.mark.parametrize(
    ("metric", "buckets"),
    [
        ("svc_time_to_first_token_seconds_bucket", _FIRST_TOKEN_BUCKETS_S),
        ("svc_time_between_tokens_seconds_bucket", _BETWEEN_TOKENS_BUCKETS_S),
        ("svc_request_duration_seconds_bucket", _DURATION_BUCKETS_S),
    ],
)
def test_every_objective_is_a_bucket_of_its_histogram(metric: str, buckets: tuple[float, ...]) -> None:
    read = [(name, value) for rule in rules("record") for name, label, value in matchers(rule["expr"]) if label == "le"]
    objectives = {value for name, value in read if name == metric}
    assert objectives
    assert objectives <= {str(float(bucket)) for bucket in buckets}


@pytest.mark.parametrize("group", ["availability_long", "latency_long"])
def test_long_windows_are_evaluated_less_often_and_without_gaps(group: str) -> None:
    (rule_group,) = [one for one in groups() if one["name"] == f"tuneserve_{group}"]
    assert 60 <= seconds(rule_group["interval"]) < 300
    assert {rule["record"].rpartition("increase")[2] for rule in rule_group["rules"]} == {"6h", "3d"}


@pytest.mark.parametrize("generate", [generate_latest, generate_openmetrics])
def test_the_latency_objective_is_a_bucket_in_the_servers_notation(generate: Any) -> None:
    registry = CollectorRegistry()
    Histogram("seconds", "As the first token's", buckets=_FIRST_TOKEN_BUCKETS_S, registry=registry)
    written = set(re.findall(r'le="([^"]+)"', generate(registry).decode()))
    first_tokens = [rule for rule in rules("record") if "first_token" in rule["record"]]
    read_by_rules = {value for rule in first_tokens for _, label, value in matchers(rule["expr"]) if label == "le"}
    read_by_rules |= {rule["labels"]["le"] for rule in first_tokens if "le" in rule.get("labels", {})}
    assert read_by_rules
    assert read_by_rules <= written
