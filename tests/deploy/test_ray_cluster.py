"""Tests that KubeRay accepts the Ray cluster, that its pods have minimal rights, and that the gateway fits it."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from svc.settings.engine import Launcher
from svc.settings.settings import Settings
from tests.deploy.deploy_files import DEPLOY, KUBERNETES, documents

OVERLAY = KUBERNETES / "overlays" / "ray"
HEAD_SERVICE = "tuneserve-ray-head-svc"  # KubeRay names it after the cluster
LABEL = {"tuneserve/ray": "true"}


def schema() -> dict[str, Any]:
    """Return KubeRay's schema of a RayCluster. As with `kubectl --validate=strict`, unknown fields are errors."""
    packed = Path(__file__).with_name("raycluster_v1.json.gz").read_bytes()
    strict: dict[str, Any] = _strict(json.loads(gzip.decompress(packed))["schema"])
    return strict


def _strict(part: Any) -> Any:
    if isinstance(part, list):
        return [_strict(each) for each in part]
    if not isinstance(part, dict):
        return part
    strict = {key: _strict(value) for key, value in part.items()}
    if isinstance(part.get("properties"), dict) and not part.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    if part.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    return strict


def cluster() -> dict[str, Any]:
    (manifest,) = documents(OVERLAY / "cluster.yaml")
    return manifest


def groups() -> Iterator[dict[str, Any]]:
    spec = cluster()["spec"]
    yield from (spec["headGroupSpec"], *spec["workerGroupSpecs"])


def gateway() -> dict[str, Any]:
    (manifest,) = documents(OVERLAY / "server.yaml")
    template: dict[str, Any] = manifest["spec"]["template"]
    return template


def errors_of(manifest: object, part: dict[str, Any]) -> list[str]:
    return [f"{each.json_path}: {each.message}" for each in jsonschema.Draft4Validator(part).iter_errors(manifest)]


def pod_schema() -> dict[str, Any]:
    template = schema()["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]["template"]
    part: dict[str, Any] = template["properties"]["spec"]
    return part


def test_kuberay_schema_accepts_the_cluster_manifest() -> None:
    assert errors_of({**cluster(), "metadata": {}}, {**schema(), "additionalProperties": True}) == []


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"rayStartParameters": {}}, "rayStartParameters"),
        ({"minReplicas": "two"}, "'two' is not of type 'integer'"),
        ({"template": {"spec": {"containers": [{"image": "tuneserve"}]}}}, "'name' is a required property"),
    ],
)
def test_kuberay_schema_rejects_an_invalid_worker_group(broken: dict[str, Any], message: str) -> None:
    part = schema()["properties"]["spec"]["properties"]["workerGroupSpecs"]["items"]
    (group,) = cluster()["spec"]["workerGroupSpecs"]
    assert any(message in each for each in errors_of(group | broken, part))


def test_gateway_pod_matches_the_kubernetes_schema() -> None:
    spec = gateway()["spec"]
    assert errors_of(spec, pod_schema()) == []


def test_ray_cluster_pods_run_with_minimal_privileges() -> None:
    for group in groups():
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] and own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"]}


def test_ray_version_in_the_manifest_matches_the_version_in_the_images() -> None:
    for variant in ("cpu", "gpu"):
        locked = (DEPLOY / "constraints" / f"{variant}.txt").read_text("utf-8").splitlines()
        assert f"ray=={cluster()['spec']['rayVersion']}" in locked
    assert "postgres,objects,ray]" in (DEPLOY / "docker" / "steps.sh").read_text("utf-8")


def test_gateway_and_ray_nodes_use_the_same_image() -> None:
    pods = [gateway()["spec"], *(group["template"]["spec"] for group in groups())]
    containers = [each for pod in pods for each in (*pod.get("initContainers", []), *pod["containers"])]
    assert {each["image"] for each in containers if "image" in each} == {"tuneserve"}
    (overlay,) = documents(OVERLAY / "kustomization.yaml")
    assert overlay["images"] == [{"name": "tuneserve", "newTag": "gpu"}]


def test_ray_cluster_and_gateway_use_the_same_authentication_token() -> None:
    assert cluster()["spec"]["authOptions"] == {"mode": "token"}
    spec = gateway()["spec"]
    for container in (*spec["initContainers"], *spec["containers"]):
        variables = {each["name"]: each for each in container["env"]}
        assert variables["RAY_AUTH_MODE"]["value"] == "token"
        secret = variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert secret == {"name": cluster()["metadata"]["name"], "key": "auth_token"}


def test_network_policy_allows_traffic_only_between_cluster_and_gateway_pods() -> None:
    (policy,) = documents(OVERLAY / "network.yaml")
    peers = [{"podSelector": {"matchLabels": LABEL}}]
    assert policy["spec"]["podSelector"] == {"matchLabels": LABEL}
    assert [each["from"] for each in policy["spec"]["ingress"]] == [peers]
    assert [each["to"] for each in policy["spec"]["egress"]] == [peers]
    for labels in (gateway()["metadata"]["labels"], *(group["template"]["metadata"]["labels"] for group in groups())):
        assert labels.items() >= LABEL.items()


def test_head_node_advertises_no_cpus_or_gpus_and_workers_advertise_their_gpu() -> None:
    head, node = groups()
    assert head["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    (container,) = node["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_gateway_settings_add_the_ray_head_address_to_the_base_settings(tmp_path: Path) -> None:
    own = yaml.safe_load((OVERLAY / "svc.yaml").read_text("utf-8"))
    base = yaml.safe_load((KUBERNETES / "base" / "svc.yaml").read_text("utf-8"))
    assert own.items() >= base.items()
    settings = Settings.model_validate({"home": tmp_path, **{key: own[key] for key in ("engine", "ray", "artifacts")}})
    assert settings.engine.launcher is Launcher.RAY
    assert settings.ray.address == f"{HEAD_SERVICE}:6379"
    (node,) = cluster()["spec"]["workerGroupSpecs"]
    (container,) = node["template"]["spec"]["containers"]
    assert any(settings.ray.folder.is_relative_to(each["mountPath"]) for each in container["volumeMounts"])
    assert node["replicas"] >= settings.engine.replica_range.max
