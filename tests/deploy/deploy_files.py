"""The files under deploy/, as data: what runs where, with which settings, secrets, ports and folders."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.docs.pages import ROOT

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
COMPOSE = [DEPLOY / "compose" / name for name in ("compose.yaml", "compose.tls.yaml")]


@dataclass(frozen=True)
class Container:
    """One container of ours.

    Attributes:
        where: the file, and its name.
        words: what `svc` is given; none of a shell's.
        variables: its environment.
        mounts: where what is mounted.
        probes: paths that are asked.
    """

    where: str
    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    mounts: dict[str, str] = field(default_factory=dict)
    probes: list[str] = field(default_factory=list)


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


def objects() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every Kubernetes object, but kustomize's own, in the files as they are."""
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        for document in documents(path):
            if "kind" in document and document["kind"] != "Kustomization":
                yield path, document


def pod_specs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every whole pod; those of overlays are patches."""
    for path, found in objects():
        if "overlays" in path.parts:
            continue
        spec = found.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            yield f"{path.relative_to(KUBERNETES)}: {found['kind']}", spec["template"]["spec"]


def pod_containers() -> Iterator[Container]:
    """The containers of all pods."""
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
    """compose.yaml."""
    (found,) = documents(COMPOSE[0])
    return found


def compose_services() -> Iterator[Container]:
    """The services of both files that run our image; YAML's merge keys are resolved."""
    for path in COMPOSE:
        (found,) = documents(path)
        for name, service in found["services"].items():
            if name.startswith("server") or name == "monitor":
                yield Container(
                    f"{path.name} {name}",
                    list(service.get("command", [])),
                    variables=dict(service.get("environment", {})),
                    mounts={text.split(":")[1]: text.split(":")[0] for text in service.get("volumes", [])},
                )


def image() -> dict[str, str]:
    """The environment of the image."""
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "docker" / "Dockerfile").read_text("utf-8"))
    lines = [line.removeprefix("ENV ") for line in text.splitlines() if line.startswith("ENV ")]
    return {name: value for line in lines for name, value in re.findall(r"(\w+)=(\S+)", line)}
