"""Tests that `make install` reports missing requirements before it downloads gigabytes."""

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
    """Return the script's exit status and output when PATH contains only a folder of tools."""
    environment = {"PATH": str(tools), "PYTHON": python, "SERVE": "serve"}
    command = ["/bin/bash", str(checkout / "deploy" / "install.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert not (checkout / ".venv").exists()
    return done.returncode, done.stderr


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Return a folder of tools that lacks a compiler."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("dirname", "rm"):
        program = shutil.which(name)
        assert program
        (folder / name).symlink_to(program)
    return folder


@pytest.mark.slow
def test_install_error_names_missing_compiler_packages(checkout: Path, tools: Path) -> None:
    status, output = install(checkout, sys.executable, tools=tools)
    assert status == 1
    assert "do: apt-get install g++\n" in output


def test_install_error_names_the_python_that_is_too_old(checkout: Path, tools: Path) -> None:
    python = tools / "python3.10"
    python.write_text('#!/bin/bash\n[ "$1" = --version ] && echo Python 3.10.13\nexit 1\n')
    python.chmod(0o755)
    status, output = install(checkout, str(python), tools=tools)
    assert status == 1
    assert f"Python 3.10.13 at {python}" in output
