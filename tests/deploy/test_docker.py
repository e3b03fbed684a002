"""The image: locked, without root, and with nothing of the builder's home. hadolint is asked where there is one."""

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
    """The text of each, by name."""
    parts = re.split(r"^FROM .* AS (\S+)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint here")
def test_hadolint_finds_no_fault() -> None:
    done = subprocess.run(["hadolint", DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_no_fault(path: str) -> None:
    done = subprocess.run(["shellcheck", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_a_variant_is_built_by_the_script_from_the_lock(variant: str) -> None:
    assert f"steps.sh build {variant} /opt/tuneserve" in stages()[f"build-{variant}"]
    assert f"--from=build-{variant} /opt/tuneserve" in stages()[variant]
    assert (DEPLOY / "constraints" / f"{variant}.txt").exists()
    script = (DEPLOY / "docker" / "steps.sh").read_text("utf-8")
    assert '--constraint "deploy/constraints/$variant.txt"' in script


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_a_variant_runs_as_a_user_that_is_not_root(variant: str) -> None:
    users = re.findall(r"^USER (\S+)$", stages()["base"] + stages()[variant], re.MULTILINE)
    assert users == ["10001:10001"]


def test_no_compiler_is_in_the_image_for_processors() -> None:
    assert COMPILERS.search(stages()["build"])
    assert not COMPILERS.search(stages()["base"] + stages()["cpu"].partition("\n#")[0])


def test_the_compiler_of_the_image_for_gpus_is_the_one_that_triton_needs() -> None:
    assert set(COMPILERS.findall(stages()["gpu"])) == {"gcc"}


def test_the_image_takes_no_gpu_by_itself() -> None:
    assert "NVIDIA_VISIBLE_DEVICES=" not in TEXT


def test_what_goes_to_the_builder_is_listed_and_is_there() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    allowed = [line.removeprefix("!") for line in lines[1:] if line.startswith("!")]
    assert all(list(ROOT.glob(pattern)) for pattern in allowed)
    needed = set(
        re.findall(r"(?:bash|install -m 644) (deploy/\S+)", (DEPLOY / "docker" / "steps.sh").read_text("utf-8"))
    )
    assert needed <= {path.relative_to(ROOT).as_posix() for pattern in allowed for path in ROOT.glob(pattern)}


def test_the_script_refuses_a_variant_that_it_does_not_know() -> None:
    done = subprocess.run(
        ["bash", DEPLOY / "docker" / "steps.sh", "build", "tpu", "/nowhere"], capture_output=True, text=True, timeout=10
    )
    assert done.returncode == 2
    assert "expected cpu or gpu" in done.stderr
