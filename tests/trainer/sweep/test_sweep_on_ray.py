"""Tests `svc sweep --on ray` on a real cluster of three nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample
from svc.errors import InterruptedRunError
from tests.trainer.conftest import make_example
from tests.trainer.ray_nodes import RayNodes, nodes_of_workers, running_nodes, workers_left

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

SAME = 1e-6
"""Maximum difference between losses of the same trial on Ray and on this machine."""
ENDS_S = 280.0
RATES = [1.0e-2, 1.0e-3]


@dataclass(frozen=True)
class Place:
    """A machine from which sweeps are started."""

    folder: Path
    recipe: Path
    address: str

    @property
    def nodes(self) -> Path:
        return self.folder / "nodes"

    @property
    def trials_with_checkpoints(self) -> set[str]:
        """The trials that have a complete checkpoint in the object store. It is deleted when the trial has finished."""
        return {path.parent.name for path in self.folder.glob("store/checkpoints/*/step-*.json")}

    def start(self, *options: str) -> "subprocess.Popen[str]":
        (self.folder / "store").mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "RAY_ADDRESS": self.address,
            "SVC_ARTIFACTS__URL": (self.folder / "store").as_uri(),
            "SVC_RAY__FOLDER": str(self.nodes),
        }
        svc = Path(sys.executable).with_name("svc")
        command = [str(svc), "--home", str(self.folder / "home"), "sweep", str(self.recipe), "--json", *options]
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_until_training(self, process: "subprocess.Popen[str]", trials: int) -> None:
        """Wait until so many trials have taken some steps, and none of them has finished."""
        deadline = time.monotonic() + ENDS_S
        while len(self.trials_with_checkpoints) < trials:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(end(process)[2])
            time.sleep(0.02)


def end(process: "subprocess.Popen[str]") -> tuple[int, Any, str]:
    """Return the exit code, the result, and the errors on one line."""
    out, errors = process.communicate(timeout=ENDS_S)
    return process.returncode, json.loads(out) if out.startswith("{") else None, " ".join(errors.split())


def losses(result: Any) -> dict[float, float]:
    """Return the held-out loss of each learning rate."""
    trials = [trial for trial in result["trials"] if trial["phase"] == "own space"]
    return {trial["values"]["train.learning_rate"]: trial["loss"]["value"] for trial in trials}


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with running_nodes(3) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, examples: list[ChatExample]) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_examples(folder / "train.jsonl", [*examples, make_example("a number", "black")])
    write_examples(folder / "heldout.jsonl", [make_example("another number", "white"), make_example("one", "red")])
    (folder / "recipe.yaml").write_text(
        f"name: tiny\nbase: {tiny_base}\ndata: {{train: train.jsonl, heldout: heldout.jsonl}}\n"
        "adapter: {rank: 4, dropout: 0.2}\ncheckpoints: {every_steps: 10}\n"
        "train: {batch_size: 4, epochs: 100, learning_rate: 0.003}\n"
        f"sweep: {{finalists: 0, space: {{train.learning_rate: {RATES}}}}}\n"
    )
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> dict[float, float]:
    """Return the losses of the sweep on this machine."""
    with Place(tmp_path_factory.mktemp("here"), recipe, "").start() as process:
        code, result, errors = end(process)
    assert code == 0, errors
    return losses(result)


@pytest.fixture
def place(tmp_path: Path, recipe: Path, nodes: RayNodes) -> Place:
    return Place(tmp_path, recipe, nodes.address)


def test_concurrent_trials_on_ray_have_the_same_losses_as_a_local_sweep(here: dict[float, float], place: Place) -> None:
    with place.start("--on", "ray") as process:
        place.wait_until_training(process, 2)
        code, result, errors = end(process)
    assert code == 0, errors
    there = losses(result)
    assert list(there) == RATES
    assert [there[rate] for rate in RATES] == pytest.approx([here[rate] for rate in RATES], abs=SAME)
    assert "up to 3 trials at the same time" in errors
    assert "trial 2: Training: step" in errors
    assert place.trials_with_checkpoints == set()
    assert workers_left() == []


def test_resumed_sweep_continues_its_interrupted_trials(here: dict[float, float], place: Place) -> None:
    with place.start("--on", "ray") as process:
        place.wait_until_training(process, 2)
        process.send_signal(signal.SIGINT)
        code, _, errors = end(process)
    assert code == InterruptedRunError.exit_code, errors
    assert len(place.trials_with_checkpoints) >= 2
    assert workers_left() == []
    with place.start("--on", "ray") as process:
        code, result, errors = end(process)
    assert code == 0, errors
    assert errors.count("resuming from step") >= 2
    assert losses(result) == pytest.approx(here, abs=SAME)


def test_trial_continues_on_another_node_when_its_node_is_lost(
    here: dict[float, float], place: Place, nodes: RayNodes
) -> None:
    with place.start("--on", "ray", "--parallel", "2") as process:
        place.wait_until_training(process, 2)
        nodes.remove(next(node for node, wrote in nodes_of_workers(place.nodes).items() if wrote))
        code, result, errors = end(process)
    nodes.add()
    assert code == 0, errors
    assert "restarting all workers from the newest checkpoint" in errors
    assert losses(result) == pytest.approx(here, abs=SAME)
