"""The releases that `make install` takes are those of every dependency, and none is older than pyproject.toml asks."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = {"cpu": ("train", "monitor", "gateway", "serve-cpu"), "gpu": ("train", "monitor", "gateway", "serve")}


def asked(extras: tuple[str, ...]) -> list[Requirement]:
    project = PROJECT["project"]
    named = [*project["dependencies"], *PROJECT["dependency-groups"]["dev"]]
    named += [text for extra in extras for text in project["optional-dependencies"][extra]]
    return [found for found in map(Requirement, named) if found.name != project["name"]]


@pytest.mark.parametrize(("name", "extras"), EXTRAS.items())
def test_every_dependency_has_its_release(name: str, extras: tuple[str, ...]) -> None:
    lines = (ROOT / "deploy" / "constraints" / f"{name}.txt").read_text("utf-8").splitlines()
    locked = {
        canonicalize_name(package): version
        for package, _, version in (line.partition("==") for line in lines if not line.startswith("#"))
    }
    found = [(needed, locked.get(canonicalize_name(needed.name))) for needed in asked(extras)]
    wrong = [f"{needed}: {version}" for needed, version in found if not version or version not in needed.specifier]
    assert not wrong, "run `make lock`"
