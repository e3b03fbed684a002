"""Tests that services are hardened and listen on loopback, and that Docker's command accepts the files."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.deploy_files import COMPOSE, DEPLOY, compose, grace_s

HAS_COMPOSE = (
    shutil.which("docker") is not None
    and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
)
SERVICES = compose()["services"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of deploy/ that includes secrets."""
    copied = shutil.copytree(DEPLOY, tmp_path_factory.mktemp("compose") / "deploy")
    for name in ("grafana_password", "tls_certificate.pem", "tls_key.pem"):
        (copied / "compose" / "secrets" / name).write_text("secret")
    return copied / "compose"


@pytest.mark.skipif(not HAS_COMPOSE, reason="no docker compose here")
@pytest.mark.parametrize("profile", ["cpu", "gpu"])
@pytest.mark.parametrize("files", [COMPOSE[:1], COMPOSE], ids=["loopback", "tls"])
def test_docker_compose_accepts_the_compose_files(folder: Path, profile: str, files: list[Path]) -> None:
    given = [word for file in files for word in ("--file", file.name)]
    done = subprocess.run(
        ["docker", "compose", *given, "config", "--format", "json"],
        cwd=folder,
        env=os.environ | {"COMPOSE_PROFILES": profile},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    assert set(services) == {f"server-{profile}", "monitor", "prometheus", "grafana"}
    assert {services[name]["image"] for name in (f"server-{profile}", "monitor")} == {f"tuneserve:{profile}"}
    assert ("SVC_SERVE__HOST" in services[f"server-{profile}"].get("environment", {})) == (len(files) == 2)


def test_compose_services_run_with_minimal_privileges() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert "privileged" not in service and "ports" not in service, name


def test_third_party_services_use_pinned_images_and_listen_on_loopback() -> None:
    for name in ("prometheus", "grafana"):
        service = SERVICES[name]
        assert service["image"].rpartition(":")[2] not in ("", "latest"), name
        texts = [*service.get("command", []), *service.get("environment", {}).values()]
        assert any("127.0.0.1" in text for text in texts), name


def test_compose_stop_timeout_allows_running_requests_to_finish() -> None:
    for name in ("server-cpu", "server-gpu"):
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > 2 * grace_s()


def test_secret_files_are_ignored_by_git() -> None:
    rules = (DEPLOY / "compose" / "secrets" / ".gitignore").read_text("utf-8").splitlines()
    assert rules == ["*", "!.gitignore"]
