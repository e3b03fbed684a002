"""Tests that every setting, command, port, path, metric and secret in deploy/ exists and is consistent."""

import re
from pathlib import Path

import pytest
import yaml

from serving.access.authenticator import Authenticator
from serving.gateway.authentication import Authentication
from serving.http.request_state import RequestState
from serving.server.openapi import openapi_document
from svc.remote.server_url import LOCK_FILE
from svc.settings.load import load_settings, setting_keys
from svc.settings.settings import ENV_PREFIX, Settings
from tests.deploy.deploy_files import (
    COMPOSE,
    DEPLOY,
    KUBERNETES,
    compose,
    compose_services,
    documents,
    image,
    objects,
    pod_containers,
    pod_specs,
)
from tests.deploy.prometheus_rules import EXPORTED, RECORDED
from tests.docs.pages import ROOT
from tests.docs.svc_usage import usage_error
from tests.new_store import new_store

CONTAINERS = [*compose_services(), *pod_containers()]
VARIABLES = {ENV_PREFIX + key.upper().replace(".", "__") for key in [*setting_keys(), *Settings.model_fields]}
TEXTS = {
    str(path.relative_to(DEPLOY)): path.read_text("utf-8")
    for path in sorted(DEPLOY.rglob("*"))
    if path.is_file() and not {"secrets", "__pycache__"} & set(path.parts)
}
PORTS = {str(Settings().serve.port), str(Settings().monitor.port)}
PATHS = set(openapi_document()["paths"])


def test_every_environment_variable_in_the_deployment_files_is_a_known_setting() -> None:
    known = VARIABLES | {"SVC_SERVER"}
    named = {name: set(re.findall(rf"\b{ENV_PREFIX}[A-Z][A-Z0-9_]*", text)) for name, text in TEXTS.items()}
    assert [f"{name}: {variable}" for name, variables in named.items() for variable in variables - known] == []


def test_every_metric_named_in_deploy_files_is_exported_or_recorded() -> None:
    known = {f"{name}{end}" for name in EXPORTED for end in ("", "_bucket", "_sum", "_count")}
    known |= {part for name in RECORDED for part in re.findall(r"svc_\w+", name)}
    named = {name: set(re.findall(r"\bsvc_[a-z_]+\b", text)) for name, text in TEXTS.items()}
    assert [f"{name}: {metric}" for name, metrics in named.items() for metric in metrics - known] == []


def test_every_container_runs_an_existing_command() -> None:
    errors = {container.where: usage_error(container.words) for container in CONTAINERS if container.words}
    assert {where: error for where, error in errors.items() if error} == {}


def test_every_folder_written_by_a_container_is_on_a_volume() -> None:
    """The rest of a container's file system is read-only."""
    missing = []
    for container in CONTAINERS:
        if not container.mounts:  # compose.tls.yaml adds to a service
            continue
        written = [image()["SVC_HOME"]]
        written += [image()["SVC_BASE_CACHE"]] if {"serve", "train"} & set(container.words) else []
        missing += [
            f"{container.where}: {folder}"
            for folder in written
            if not any(Path(folder).is_relative_to(mount) for mount in container.mounts)
        ]
        missing += [] if image()["TMPDIR"] in container.mounts else [f"{container.where}: TMPDIR"]
    assert missing == []


def test_health_probe_paths_require_no_api_key(tmp_path: Path) -> None:
    authentication = Authentication(Authenticator(new_store(tmp_path)), keys_needed=True, on_failure=print)
    for one in CONTAINERS:
        assert PATHS.issuperset(one.probes), one.where
        for path in one.probes:
            authentication.check(RequestState("req-1", {}), path)


def test_deployed_settings_files_are_accepted() -> None:
    for path in (DEPLOY / "systemd" / "svc.yaml", KUBERNETES / "base" / "svc.yaml"):
        settings = load_settings(path)
        assert {str(settings.serve.port), str(settings.monitor.port)} == PORTS, path


def test_compose_environment_settings_are_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for service in compose_services():
        for name, value in service.variables.items():
            monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))
    assert load_settings().serve.tls_certificate == Path("/run/secrets/tls_certificate")


def test_image_exposes_the_default_server_and_monitor_ports() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text("utf-8")
    assert set(re.findall(r"^EXPOSE (.*)$", text, re.MULTILINE)[0].split()) == PORTS


def test_pods_and_services_use_the_ports_in_the_settings() -> None:
    of_containers = {
        str(port["containerPort"])
        for _, spec in pod_specs()
        for container in spec["containers"]
        for port in container.get("ports", [])
    }
    of_services = {
        str(port["port"]) for _, one in objects() if one["kind"] == "Service" for port in one["spec"]["ports"]
    }
    (policy,) = [one for _, one in objects() if one["kind"] == "NetworkPolicy" and not one["spec"]["podSelector"]]
    of_policy = {str(port["port"]) for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    assert of_containers == of_services == of_policy == PORTS


def test_prometheus_scrapes_the_exporter() -> None:
    (config,) = documents(DEPLOY / "prometheus" / "prometheus.yml")
    targets = [target for job in config["scrape_configs"] for one in job["static_configs"] for target in one["targets"]]
    assert targets == [f"{Settings().monitor.host}:{Settings().monitor.port}"]


def test_scrape_job_name_is_the_same_in_kubernetes_and_in_the_prometheus_config() -> None:
    (config,) = documents(DEPLOY / "prometheus" / "prometheus.yml")
    (monitor,) = [one for _, one in objects() if one["kind"] == "ServiceMonitor"]
    label, wanted = monitor["spec"]["jobLabel"], monitor["spec"]["selector"]["matchLabels"]
    services = [one["metadata"].get("labels", {}) for _, one in objects() if one["kind"] == "Service"]
    (chosen,) = [labels for labels in services if wanted.items() <= labels.items()]
    assert [chosen[label]] == [job["job_name"] for job in config["scrape_configs"]]


def test_every_compose_secret_is_defined_and_mounted_where_it_is_read() -> None:
    for path in COMPOSE:
        (file,) = documents(path)
        services = [service for service in file["services"].values() if service.get("secrets")]
        assert {secret for service in services for secret in service["secrets"]} == set(file["secrets"]), path
        for service in services:
            read = {Path(value).name for value in service["environment"].values() if value.startswith("/run/secrets/")}
            assert read == set(service["secrets"]), path
        assert all("file" in secret for secret in file["secrets"].values()), path


def test_every_pod_volume_exists_and_is_used() -> None:
    for where, spec in pod_specs():
        containers = [*spec.get("initContainers", []), *spec["containers"]]
        mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}, where


def test_every_volume_claim_and_secret_is_defined_or_documented() -> None:
    made = {one["metadata"]["name"] for _, one in objects() if one["kind"] == "PersistentVolumeClaim"}
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for _, spec in pod_specs()
        for volume in spec["volumes"]
        if "persistentVolumeClaim" in volume
    }
    secrets = {
        volume["secret"]["secretName"] for _, spec in pod_specs() for volume in spec["volumes"] if "secret" in volume
    }
    page = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    assert {name for name in (claims - made) | secrets if name not in page} == set()


def test_kubernetes_manifests_reference_secrets_without_containing_them() -> None:
    assert [one for _, one in objects() if one["kind"] == "Secret"] == []


def test_certificate_path_is_inside_the_mounted_secret() -> None:
    serve = load_settings(KUBERNETES / "base" / "svc.yaml").serve
    servers = [one for one in pod_containers() if "serve" in one.words]
    assert servers
    for server in servers:
        assert serve.tls_certificate is not None and str(serve.tls_certificate.parent) in server.mounts


def test_server_accepts_the_service_host_names() -> None:
    hosts = set(load_settings(KUBERNETES / "base" / "svc.yaml").serve.allowed_hosts)
    (namespace,) = [one["metadata"]["name"] for _, one in objects() if one["kind"] == "Namespace"]
    services = [one["metadata"]["name"] for _, one in objects() if one["kind"] == "Service"]
    service = next(name for name in services if not name.endswith("-metrics"))
    full = f"{service}.{namespace}.svc.cluster.local"
    assert hosts == {service, f"{service}.{namespace}", f"{service}.{namespace}.svc", full}


def test_files_mounted_by_compose_exist() -> None:
    for service in compose()["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (COMPOSE[0].parent / source).exists(), source


def test_dashboards_are_in_the_folder_grafana_reads() -> None:
    (provider,) = documents(DEPLOY / "grafana" / "provisioning" / "dashboards" / "tuneserve.yml")
    mounts = compose()["services"]["grafana"]["volumes"]
    folder = provider["providers"][0]["options"]["path"]
    assert f"../../monitoring/dashboards:{folder}:ro" in mounts
    listed = yaml.safe_load((KUBERNETES / "monitoring" / "kustomization.yaml").read_text("utf-8"))
    named = {(KUBERNETES / "monitoring" / file).resolve() for file in listed["configMapGenerator"][0]["files"]}
    assert named == set((DEPLOY.parent / "monitoring" / "dashboards").glob("*.json"))


def test_health_check_reads_the_server_lock_file() -> None:
    text = (DEPLOY / "docker" / "health.py").read_text("utf-8")
    assert f'"{LOCK_FILE}"' in text
    assert set(re.findall(r'"(/health\S*)"', text)) <= PATHS
