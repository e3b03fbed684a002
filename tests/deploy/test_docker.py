"""Tests that the image is pinned, rootless and free of builder files. hadolint runs if it is installed."""

import re
import shutil
import subprocess

import pytest

from tests.deploy.deploy_files import DEPLOY
from tests.docs.pages import ROOT

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
TEXT = re.sub(r"\\\n\s*", " ", DOCKERFILE.read_text("utf-8"))
SCRIPTS = sorted([*DEPLOY.rglob("*.sh"), *(ROOT / "benchmarks").rglob("*.sh")])
COMPILERS = re.compile(r"\b(build-essential|gcc|g\+\+|clang|cmake|make)\b")


def stages() -> dict[str, str]:
    """Return the text of each build stage, keyed by name."""
    parts = re.split(r"^FROM .* AS (\S+)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint here")
def test_dockerfile_has_no_hadolint_warnings() -> None:
    done = subprocess.run(["hadolint", DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_shell_scripts_pass_shellcheck() -> None:
    done = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_image_is_built_with_the_constraints_file_and_does_not_run_as_root() -> None:
    script = (DEPLOY / "docker" / "steps.sh").read_text("utf-8")
    assert '--constraint "deploy/constraints/$variant.txt"' in script
    for variant in ("cpu", "gpu"):
        assert f"steps.sh build {variant} /opt/tuneserve" in stages()[f"build-{variant}"]
        assert f"--from=build-{variant} /opt/tuneserve" in stages()[variant]
        assert (DEPLOY / "constraints" / f"{variant}.txt").exists()
        users = re.findall(r"^USER (\S+)$", stages()["base"] + stages()[variant], re.MULTILINE)
        assert users == ["10001:10001"], variant


def test_cpu_image_has_no_compiler() -> None:
    assert COMPILERS.search(stages()["build"])
    assert not COMPILERS.search(stages()["base"] + stages()["cpu"].partition("\n#")[0])


def test_gpu_image_contains_only_the_compiler_that_triton_needs() -> None:
    assert set(COMPILERS.findall(stages()["gpu"])) == {"gcc"}


def test_image_does_not_set_nvidia_visible_devices() -> None:
    assert "NVIDIA_VISIBLE_DEVICES=" not in TEXT


def test_dockerignore_exceptions_match_existing_files_and_cover_every_file_the_build_needs() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    allowed = [line.removeprefix("!") for line in lines[1:] if line.startswith("!")]
    assert all(list(ROOT.glob(pattern)) for pattern in allowed)
    needed = set(
        re.findall(r"(?:bash|install -m 644) (deploy/\S+)", (DEPLOY / "docker" / "steps.sh").read_text("utf-8"))
    )
    assert needed <= {path.relative_to(ROOT).as_posix() for pattern in allowed for path in ROOT.glob(pattern)}


def test_build_script_rejects_unknown_variant() -> None:
    done = subprocess.run(
        ["bash", DEPLOY / "docker" / "steps.sh", "build", "tpu", "/nowhere"], capture_output=True, text=True, timeout=10
    )
    assert done.returncode == 2
    assert "must be cpu or gpu" in done.stderr
