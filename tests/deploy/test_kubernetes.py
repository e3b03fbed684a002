"""Tests that kustomize builds every overlay, pods have minimal rights, and the rules are the tested ones."""

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from svc.errors import InterruptedRunError
from tests.deploy.deploy_files import KUBERNETES, grace_s, objects, pod_specs

BUILT = sorted(path.parent for path in KUBERNETES.rglob("kustomization.yaml") if path.parent.name != "base")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")


@cache
def built(folder: Path) -> list[dict[str, Any]]:
    """Return the objects that `kubectl apply` would send for a folder."""
    command = ["kubectl", "kustomize", "--load-restrictor", "LoadRestrictionsNone", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def _pods(manifest: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for one in manifest:
        spec = one.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            yield spec["template"]["spec"]


@pytest.mark.slow
@needs_kubectl
@pytest.mark.parametrize("folder", BUILT, ids=lambda folder: folder.name)
def test_kustomize_builds_every_overlay_with_a_tagged_image(folder: Path) -> None:
    for pod in _pods(built(folder)):
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert container["image"] in ("tuneserve:cpu", "tuneserve:gpu")
    assert {one["metadata"].get("namespace", "tuneserve") for one in built(folder)} == {"tuneserve"}


@needs_kubectl
@pytest.mark.parametrize(("overlay", "gpus"), [("cpu", None), ("gpu", "1"), ("gpus", "4")])
def test_overlay_sets_the_gpu_limit_without_removing_server_probes_or_volumes(overlay: str, gpus: str | None) -> None:
    (pod,) = [pod for pod in _pods(built(KUBERNETES / "overlays" / overlay)) if len(pod["containers"]) > 1]
    (server,) = [container for container in pod["containers"] if container["name"] == "server"]
    assert server["resources"]["limits"].get("nvidia.com/gpu") == gpus
    assert server["image"] == f"tuneserve:{'gpu' if gpus else 'cpu'}"
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(server)
    assert {volume["name"] for volume in pod["volumes"]} >= {"home", "base", "tmp", "shm"}


def test_pods_run_with_minimal_privileges() -> None:
    for where, spec in pod_specs():
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] and pod["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert spec["automountServiceAccountToken"] is False, where
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] and own["allowPrivilegeEscalation"] is False, where
            assert own["capabilities"] == {"drop": ["ALL"]}, where


def _server() -> dict[str, Any]:
    (spec,) = [spec for where, spec in pod_specs() if "StatefulSet" in where]
    return spec


def test_only_the_readiness_probe_depends_on_the_engine_state() -> None:
    (server,) = [container for container in _server()["containers"] if container["name"] == "server"]
    asked = {kind: server[kind]["httpGet"]["path"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {"startupProbe": "/health/live", "livenessProbe": "/health/live", "readinessProbe": "/health"}


def test_pod_termination_waits_for_running_requests() -> None:
    assert _server()["terminationGracePeriodSeconds"] > 2 * grace_s()


def test_engine_sockets_are_in_a_memory_backed_volume() -> None:
    (tmp,) = [volume for volume in _server()["volumes"] if volume["name"] == "tmp"]
    assert tmp["emptyDir"]["medium"] == "Memory"
    mounts = [mount for container in _server()["containers"] for mount in container["volumeMounts"]]
    assert {mount["name"] for mount in mounts if mount["mountPath"] == "/tmp"} == {"tmp"}


def test_server_stateful_set_has_exactly_one_replica() -> None:
    (manifest,) = [one for _, one in objects() if one["kind"] == "StatefulSet" and "replicas" in one["spec"]]
    assert manifest["spec"]["replicas"] == 1


def test_training_job_resumes_after_node_drain_and_fails_on_other_errors() -> None:
    (manifest,) = [one for _, one in objects() if one["kind"] == "Job"]
    (rule,) = [one["onExitCodes"] for one in manifest["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in one]
    assert rule["operator"] == "NotIn"
    assert InterruptedRunError.exit_code in rule["values"]
    assert manifest["spec"]["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.slow
def test_prometheus_operator_manifest_matches_the_prometheus_rule_files() -> None:
    source = importlib.util.spec_from_file_location("prometheus_rule", KUBERNETES / "prometheus_rule.py")
    assert source is not None and source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    assert module.FILE.read_text("utf-8") == module.content(), "run `make rules`"
