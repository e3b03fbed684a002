"""A training that was stopped by a signal, and later killed while its engine started, continues where it was."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.service import svc
from svc.errors import InterruptedRunError

pytestmark = [pytest.mark.matrix]


def test_run_that_was_interrupted_and_later_killed_resumes_after_its_last_finished_stage(
    workplace: Path, tmp_path: Path
) -> None:
    recipe = str(workplace / "recipe.yaml")
    training = _train_until(tmp_path, recipe, "checkpoints/step-*", "--set", "checkpoints.every_steps=1")
    training.terminate()  # as when a spot machine is reclaimed
    assert training.wait(60) == InterruptedRunError.exit_code
    training = _train_until(tmp_path, recipe, "engine.log")
    training.kill()  # it cannot stop its engine
    training.wait()

    resumed = svc(tmp_path, "train", recipe, capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "train: already done" in resumed.stderr
    assert "merge: already done" in resumed.stderr
    assert "evaluate: already done" not in resumed.stderr


def _train_until(home: Path, recipe: str, file: str, *options: str) -> "subprocess.Popen[bytes]":
    """Start `svc train` and wait until the run's folder contains the given file."""
    command = [str(Path(sys.executable).with_name("svc")), "--home", str(home), "train", recipe, *options]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not list(home.glob(f"runs/*/{file}")):
        assert training.poll() is None, "the training ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return training
