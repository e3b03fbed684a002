"""`make install` says what the machine lacks before it fetches gigabytes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.deploy_files import DEPLOY


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    shutil.copytree(DEPLOY, folder / "deploy")
    return folder


def install(checkout: Path, python: str, *, tools: Path) -> tuple[int, str]:
    """Its exit status, and what it said, where PATH is a folder of tools alone."""
    environment = {"PATH": str(tools), "PYTHON": python, "SERVE": "serve"}
    command = ["/bin/bash", str(checkout / "deploy" / "install.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert not (checkout / ".venv").exists()
    return done.returncode, done.stderr


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """No compiler among them."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("dirname", "rm"):
        found = shutil.which(name)
        assert found
        (folder / name).symlink_to(found)
    return folder


def test_the_error_names_the_packages_when_a_compiler_is_missing(checkout: Path, tools: Path) -> None:
    status, said = install(checkout, sys.executable, tools=tools)
    assert status == 1
    assert "do: apt-get install g++\n" in said


def test_the_error_names_the_python_when_it_is_too_old(checkout: Path, tools: Path) -> None:
    python = tools / "python3.10"
    python.write_text('#!/bin/bash\n[ "$1" = --version ] && echo Python 3.10.13\nexit 1\n')
    python.chmod(0o755)
    status, said = install(checkout, str(python), tools=tools)
    assert status == 1
    assert f"Python 3.10.13 at {python}" in said
