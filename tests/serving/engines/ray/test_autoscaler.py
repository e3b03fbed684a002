"""Tests whether a Ray cluster is known to add machines on demand, from reports in Ray's own format."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from serving.engines.ray.autoscaler import adds_machines

pytestmark = pytest.mark.slow  # imports Ray

HEAD, WORKER = "a" * 56, "b" * 56


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connect to a cluster of two machines."""
    nodes = [{"NodeID": HEAD, "Alive": True}, {"NodeID": WORKER, "Alive": False}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="head:6379"))


def report(monkeypatch: pytest.MonkeyPatch, *types: str) -> None:
    """Let the autoscaler's first version report machines of these types."""
    from ray.autoscaler._private.autoscaler import AutoscalerSummary

    summary = AutoscalerSummary(
        active_nodes=dict.fromkeys(types, 1), idle_nodes=None, pending_nodes=[], pending_launches={}, failed_nodes=[]
    )
    text = json.dumps({"gcs_request_time": 0.1, "autoscaler_report": asdict(summary)}).encode()
    monkeypatch.setattr("ray.autoscaler.v2.utils.is_autoscaler_v2", lambda: False)
    set_report(monkeypatch, text)


def set_report(monkeypatch: pytest.MonkeyPatch, text: bytes | None) -> None:
    client = SimpleNamespace(internal_kv_get=lambda key: text if key == b"__autoscaling_status" else None)
    monkeypatch.setattr("ray.experimental.internal_kv.internal_kv_get_gcs_client", lambda: client)


def report_v2(monkeypatch: pytest.MonkeyPatch, *types: str) -> None:
    """Let the autoscaler's second version report machines of these types."""
    from ray.autoscaler.v2.schema import ClusterStatus, NodeInfo

    idle = [
        NodeInfo(instance_type_name="", node_status="IDLE", ray_node_type_name=name, instance_id="", ip_address="")
        for name in types
    ]
    monkeypatch.setattr("ray.autoscaler.v2.utils.is_autoscaler_v2", lambda: True)
    monkeypatch.setattr("ray.autoscaler.v2.sdk.get_cluster_status", lambda address: ClusterStatus(idle_nodes=idle))


def test_cluster_without_autoscaler_node_types_does_not_count_as_scalable(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import format_readonly_node_type

    report(monkeypatch, format_readonly_node_type(HEAD), format_readonly_node_type(WORKER))
    assert not adds_machines()


def test_cluster_with_autoscaler_node_types_counts_as_scalable_even_if_only_its_head_node_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report(monkeypatch, "headgroup")
    assert adds_machines()


def test_cluster_counts_as_scalable_if_a_legacy_autoscaler_reports_only_the_head_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From a report of Ray 2.60, with its provider of fake machines."""
    seen = {"active_nodes": {}, "pending_launches": {}, "node_type_mapping": {HEAD: "ray.head.default"}, "legacy": True}
    report(monkeypatch)
    set_report(monkeypatch, json.dumps({"autoscaler_report": seen}).encode())
    assert adds_machines()


def test_cluster_does_not_count_as_scalable_before_its_autoscaler_has_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    report(monkeypatch)
    set_report(monkeypatch, None)
    assert not adds_machines()


@pytest.mark.parametrize(("types", "adds"), [(["headgroup", f"node_{WORKER}"], True), ([f"node_{HEAD}"], False)])
def test_autoscaler_v2_report_is_parsed(monkeypatch: pytest.MonkeyPatch, types: list[str], adds: bool) -> None:
    report_v2(monkeypatch, *types)
    assert adds_machines() is adds
