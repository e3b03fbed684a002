"""The files under deploy/ as data: containers with their settings, secrets, ports and folders."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from starlette.applications import Starlette

from tests.docs.pages import ROOT

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
COMPOSE = [DEPLOY / "compose" / name for name in ("compose.yaml", "compose.tls.yaml")]


@dataclass(frozen=True)
class Container:
    """One of our containers.

    Attributes:
        where: file and name of the container.
        words: arguments of `svc`; empty for a shell.
        variables: environment variables of the container.
        mounts: mounted volumes, keyed by folder.
        probes: probed paths.
    """

    where: str
    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    mounts: dict[str, str] = field(default_factory=dict)
    probes: list[str] = field(default_factory=list)


@cache
def documents(path: Path) -> list[dict[str, Any]]:
    """Return all documents in a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


def objects() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield every Kubernetes object in the files, except kustomize's own."""
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        for document in documents(path):
            if "kind" in document and document["kind"] != "Kustomization":
                yield path, document


def pod_specs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every complete pod spec. Pods in overlays are excluded because they are patches."""
    for path, document in objects():
        if "overlays" in path.parts:
            continue
        spec = document.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            yield f"{path.relative_to(KUBERNETES)}: {document['kind']}", spec["template"]["spec"]


def pod_containers() -> Iterator[Container]:
    """Yield the containers of all pods."""
    for where, spec in pod_specs():
        for one in [*spec.get("initContainers", []), *spec["containers"]]:
            probes = [one[kind] for kind in ("startupProbe", "livenessProbe", "readinessProbe") if kind in one]
            yield Container(
                f"{where} {one['name']}",
                [] if "command" in one else list(one.get("args", [])),
                mounts={mount["mountPath"]: mount["name"] for mount in one.get("volumeMounts", [])},
                probes=[probe["httpGet"]["path"] for probe in probes if "httpGet" in probe],
            )


def compose() -> dict[str, Any]:
    """Return the content of compose.yaml."""
    (document,) = documents(COMPOSE[0])
    return document


def compose_services() -> Iterator[Container]:
    """Yield the services of both Compose files that run our image, with YAML merge keys resolved."""
    for path in COMPOSE:
        (document,) = documents(path)
        for name, service in document["services"].items():
            if name.startswith("server") or name == "monitor":
                yield Container(
                    f"{path.name} {name}",
                    list(service.get("command", [])),
                    variables=dict(service.get("environment", {})),
                    mounts={text.split(":")[1]: text.split(":")[0] for text in service.get("volumes", [])},
                )


def image() -> dict[str, str]:
    """Return the environment variables of the image."""
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "docker" / "Dockerfile").read_text("utf-8"))
    lines = [line.removeprefix("ENV ") for line in text.splitlines() if line.startswith("ENV ")]
    return {name: value for line in lines for name, value in re.findall(r"(\w+)=(\S+)", line)}


def grace_s() -> int:
    """Return how long the server waits for running requests after SIGTERM, in seconds."""
    from serving.server.http_server import HttpServer

    seconds = HttpServer(Starlette(), most=1).config.timeout_graceful_shutdown
    assert seconds is not None
    return seconds
