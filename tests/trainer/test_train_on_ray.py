"""Tests `svc train --on ray` on a real cluster of three nodes, with two workers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample
from svc.errors import BusyError, InterruptedRunError, ServerNotRunningError, TrainingError
from tests.trainer.conftest import make_example
from tests.trainer.ray_nodes import RayNodes, nodes_of_workers, running_nodes, workers_left

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

STEPS = 120
SAME = 1e-6
"""Maximum difference between weights that were trained on Ray and in two processes of this machine."""
ENDS_S = 240.0
REFUSED_S = 30.0
"""Seconds within which a training that cannot start is refused, on a busy machine, with the imports."""


@dataclass(frozen=True)
class Place:
    """A machine from which trainings are started. Its object store is `shared`, or its own folder."""

    folder: Path
    recipe: Path
    address: str
    shared: Path | None = None

    @property
    def nodes(self) -> Path:
        return self.folder / "nodes"

    @property
    def store(self) -> Path:
        return (self.shared or self.folder) / "store"

    @property
    def checkpoints(self) -> list[str]:
        """The complete checkpoints in the object store."""
        return sorted(path.stem for path in self.store.glob("checkpoints/*/step-*.json"))

    def start(self, *options: str, address: str | None = None) -> "subprocess.Popen[str]":
        """Start `svc train` in a session of its own, so that a signal to it reaches no other process."""
        self.store.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "RAY_ADDRESS": address or self.address,
            "SVC_ARTIFACTS__URL": self.store.as_uri(),
            "SVC_RAY__FOLDER": str(self.nodes),
            "SVC_RAY__WAIT_S": "3",
        }
        svc = Path(sys.executable).with_name("svc")
        command = [str(svc), "--home", str(self.folder / "home"), "train", str(self.recipe), *options]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def train(self, *options: str, address: str | None = None) -> tuple[int, str]:
        """Return the exit code of `svc train`, and its errors on one line."""
        with self.start(*options, address=address) as process:
            return end(process)

    def wait_for_checkpoint(self, process: "subprocess.Popen[str]") -> None:
        deadline = time.monotonic() + ENDS_S
        while not self.checkpoints:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(end(process)[1])
            time.sleep(0.02)

    def difference(self, other: "Place") -> float:
        """Return the largest difference between the two machines' adapters."""
        path = Path("home", "models", "tiny", "1", "adapter", "adapter_model.safetensors")
        one, two = load_file(self.folder / path), load_file(other.folder / path)
        assert one.keys() == two.keys()
        return max(float((one[name] - two[name]).abs().max()) for name in one)


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    _, errors = process.communicate(timeout=ENDS_S)
    return process.returncode, " ".join(errors.split())


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with running_nodes(3) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, examples: list[ChatExample]) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_examples(folder / "train.jsonl", [*examples, make_example("a number", "black")])
    write_examples(folder / "heldout.jsonl", [make_example("another number", "white")])
    (folder / "recipe.yaml").write_text(
        f"name: tiny\nbase: {tiny_base}\nformats: [adapter]\ndata: {{train: train.jsonl, heldout: heldout.jsonl}}\n"
        "adapter: {rank: 4, dropout: 0.2}\ncheckpoints: {every_steps: 10}\n"
        "train: {batch_size: 4, epochs: 30, learning_rate: 0.01, devices: 2}\n"
    )
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, recipe: Path, nodes: RayNodes) -> Place:
    """Return a machine that has trained in two processes of its own."""
    place = Place(tmp_path_factory.mktemp("here"), recipe, nodes.address)
    code, errors = place.train()
    assert code == 0, errors
    return place


@pytest.fixture
def place(tmp_path: Path, recipe: Path, nodes: RayNodes) -> Place:
    return Place(tmp_path, recipe, nodes.address)


def test_adapter_trained_on_two_ray_nodes_equals_the_adapter_of_two_local_processes(here: Place, place: Place) -> None:
    code, errors = place.train("--on", "ray")
    assert code == 0, errors
    assert place.difference(here) <= SAME
    assert f"Training: step {STEPS}/{STEPS}, loss" in errors
    assert f"step {STEPS}" not in errors.replace(f"step {STEPS}/", "")
    assert place.checkpoints == []
    assert workers_left() == []
    assert not any(place.nodes.glob("training/*"))


@pytest.mark.parametrize("first", [True, False], ids=["first worker", "second worker"])
def test_training_continues_on_another_ray_node_when_a_node_is_lost(
    first: bool, here: Place, place: Place, nodes: RayNodes
) -> None:
    with place.start("--on", "ray") as process:
        place.wait_for_checkpoint(process)
        node = next(node for node, wrote in nodes_of_workers(place.nodes).items() if wrote is first)
        nodes.remove(node)
        removed = place.checkpoints[-1]
        code, errors = end(process)
    nodes.add()
    assert code == 0, errors
    assert "restarting all workers from the newest checkpoint" in errors
    resumed = int(errors.partition("resuming from step ")[2].split()[0])
    assert resumed >= int(removed.removeprefix("step-"))
    assert place.difference(here) <= SAME
    assert workers_left() == []


def test_ctrl_c_stops_all_workers_and_the_next_run_resumes(here: Place, place: Place) -> None:
    with place.start("--on", "ray") as process:
        place.wait_for_checkpoint(process)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        code, errors = end(process)
    assert code == InterruptedRunError.exit_code, errors
    assert "stopped by SIGINT after step" in errors
    assert time.monotonic() - sent < REFUSED_S
    assert workers_left() == []
    code, errors = place.train("--on", "ray")
    assert code == 0, errors
    assert "resuming from step" in errors
    assert place.difference(here) <= SAME


def test_second_command_for_the_same_run_is_refused_while_the_first_is_running(place: Place, tmp_path: Path) -> None:
    """The two commands share the object store and the cluster, but no home, as on two machines. One node is free."""
    other = replace(place, folder=tmp_path / "other", shared=place.folder)
    command = ["--on", "ray", "--set", "train.epochs=3000"]  # the first still trains when the second has waited
    with place.start(*command) as process:
        try:
            place.wait_for_checkpoint(process)
            code, errors = other.train(*command, "--set", "train.devices=1")
        finally:
            process.terminate()
        end(process)
    assert code == BusyError.exit_code, errors
    assert f"process {process.pid} on" in errors


def test_ray_workers_exit_when_the_training_command_is_killed(place: Place) -> None:
    with place.start("--on", "ray") as process:
        place.wait_for_checkpoint(process)
        process.kill()
    assert workers_left() == []


def test_training_is_refused_within_seconds_when_no_cluster_answers(place: Place) -> None:
    started = time.monotonic()
    code, errors = place.train("--on", "ray", address="127.0.0.1:1")
    assert code == ServerNotRunningError.exit_code
    assert "no Ray cluster answers at 127.0.0.1:1" in errors
    assert time.monotonic() - started < REFUSED_S


def test_training_is_refused_within_seconds_when_the_cluster_is_too_small(place: Place) -> None:
    started = time.monotonic()
    code, errors = place.train("--on", "ray", "--set", "train.devices=4")
    assert code == TrainingError.exit_code
    assert "no free resources for 4 workers with 1 CPU each within 3 s: its nodes have capacity for only 3" in errors
    assert time.monotonic() - started < REFUSED_S
