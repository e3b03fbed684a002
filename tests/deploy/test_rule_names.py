"""Tests that rules read only exported series. To Prometheus, a misspelt name is a series without samples."""

import re

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from serving.protocols.route import Route
from serving.telemetry.metrics import GatewayMetrics
from svc.version import Format, Target, VersionId
from tests.deploy.prometheus_rules import (
    EXPORTED,
    PAGE,
    RECORDED,
    grouped_by,
    groups,
    matchers,
    metrics,
    rules,
    seconds,
)
from tests.docs.pages import rows

SCRAPED = {"job", "namespace", "instance"}  # added by Prometheus
ENGINE = {"model", "version", "replica"}  # added by the server to vLLM's metrics
RULES = rules("alert") + rules("record")


def _family(series: str) -> str:
    """Return the metric that a series belongs to. A histogram's buckets are separate series."""
    base = re.sub(r"_(bucket|count|sum)$", "", series)
    return base if EXPORTED.get(base, ("", set()))[0] == "histogram" else series


def _labels(name: str) -> set[str]:
    """Return the labels of an exported metric, or the labels that begin the name of a recorded series."""
    if name in RECORDED:
        return set(name.partition(":")[0].split("_"))
    _, labels = EXPORTED[_family(name)]
    return labels | SCRAPED | ({"le"} if name.endswith("_bucket") else set())


def test_every_metric_in_a_rule_is_exported_or_recorded() -> None:
    known = set(EXPORTED) | RECORDED
    read = [(rule["expr"], name) for rule in RULES for name in metrics(rule["expr"])]
    assert [f"{name} in {expression}" for expression, name in read if _family(name) not in known] == []


def test_every_label_in_a_rule_exists() -> None:
    unknown = []
    for expression in (rule["expr"] for rule in RULES):
        labels = {name: _labels(name) for name in metrics(expression)}
        unknown += [(expression, label) for name, label, _ in matchers(expression) if label not in labels[name]]
        engine = ENGINE if "vllm:" in expression else set()
        grouped = grouped_by(expression) - SCRAPED.union(engine, *labels.values())
        unknown += [(expression, label) for label in grouped]
    assert unknown == []


def test_alerts_on_per_model_metrics_have_the_model_label() -> None:
    wrong = []
    for rule in rules("alert"):
        names = metrics(rule["expr"])
        if names and all("model" in _labels(name) for name in names):
            described = "{{ $labels.model }}" in rule["annotations"]["description"]
            kept = all("model" in labels for labels in re.findall(r"\bby \(([^)]*)\)", rule["expr"]))
            wrong += [] if described and kept else [rule["alert"]]
    assert wrong == []


def test_aggregations_in_rules_keep_the_job_and_namespace_labels() -> None:
    kept = [(rule["expr"], labels) for rule in RULES for labels in re.findall(r"\bby \(([^)]*)\)", rule["expr"])]
    assert [one for one in kept if not {"job", "namespace"} <= set(re.split(r", ?", one[1]))] == []


def test_every_label_value_selected_by_a_rule_is_documented() -> None:
    values = re.findall(r"`(\w+)`", PAGE)
    patterns = {
        pattern
        for rule in RULES
        for _, label, text in matchers(rule["expr"])
        if label not in SCRAPED | {"le"}
        for pattern in text.split("|")
    }
    assert [pattern for pattern in patterns if not any(re.fullmatch(pattern, value) for value in values)] == []


def test_server_faults_are_429_and_5xx_responses_except_for_per_key_rate_limits() -> None:
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


def test_every_latency_objective_matches_a_histogram_bucket_boundary() -> None:
    registry, served = CollectorRegistry(), Target(VersionId("tiny", 1), Format.MERGED)
    observed = GatewayMetrics(registry)
    observed.first_token(served, 1.0)
    observed.between_tokens(served)(1.0)
    observed.request_ended(served, Route.CHAT_COMPLETIONS, 200, 1.0)
    pages = [generate(registry).decode() for generate in (generate_latest, generate_openmetrics)]
    records = rules("record")
    for metric in (
        "svc_time_to_first_token_seconds",
        "svc_time_between_tokens_seconds",
        "svc_request_duration_seconds",
    ):
        read = [one for rule in records for one in matchers(rule["expr"]) if one[:2] == (f"{metric}_bucket", "le")]
        objectives = {value for _, _, value in read}
        if metric == "svc_time_to_first_token_seconds":  # the only one that a model can have of its own
            objectives |= {rule["labels"]["le"] for rule in records if "le" in rule.get("labels", {})}
        assert objectives, metric
        for page in pages:
            assert objectives <= set(re.findall(rf'^{metric}_bucket{{.*?\ble="([^"]+)"', page, re.MULTILINE)), metric


def test_rules_with_long_windows_are_evaluated_less_often_but_frequently_enough_to_avoid_gaps() -> None:
    long = [group for group in groups() if group["name"] in ("tuneserve_availability_long", "tuneserve_latency_long")]
    assert len(long) == 2
    for group in long:
        assert 60 <= seconds(group["interval"]) < 300, group["name"]
        assert {rule["record"].rpartition("increase")[2] for rule in group["rules"]} == {"6h", "3d"}, group["name"]
