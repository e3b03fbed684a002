"""Merging, evaluation and quantization on a node of a real Ray cluster, with the real engine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from svc.errors import InterruptedRunError
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.version import Format, VersionId
from tests.trainer.ray_nodes import RayNodes, nodes_of_workers, running_nodes, workers_left
from trainer.export.eight_bits import quantize_to_8_bits
from trainer.export.merge import merge_adapter

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

VERSION = VersionId("tiny", 1)
STARTS_S, ENDS_S = 400.0, 500.0
"""Times on a busy machine. On an idle one, an engine starts in 30 s."""


@dataclass(frozen=True)
class Place:
    """A machine without an engine, from which trainings are started."""

    folder: Path
    recipe: Path
    address: str

    @property
    def nodes(self) -> Path:
        return self.folder / "nodes"

    @property
    def registry(self) -> Registry:
        url = (self.folder / "store").as_uri()
        return Registry.of(Settings(home=self.folder / "home", artifacts={"url": url}))

    def start(self) -> "subprocess.Popen[str]":
        """Start `svc train` in a session of its own, so that a signal to it reaches no other process."""
        (self.folder / "store").mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "SVC_ENGINE__DEVICE": "cpu",
            "SVC_RAY__ADDRESS": self.address,
            "SVC_RAY__FOLDER": str(self.nodes),
            "SVC_ARTIFACTS__URL": (self.folder / "store").as_uri(),
        }
        svc = Path(sys.executable).with_name("svc")
        command = [str(svc), "--home", str(self.folder / "home"), "train", str(self.recipe), "--on", "ray"]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def wait_for_engine(self, process: "subprocess.Popen[str]") -> None:
        """Wait until a node starts an engine."""
        deadline = time.monotonic() + STARTS_S
        while not self.engines():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(end(process)[1])
            time.sleep(0.1)

    def engines(self) -> list[psutil.Process]:
        """Return the processes of the nodes' engines, whose command names a model in the nodes' folder."""
        running = []
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or ())
            if "vllm.entrypoints" in command and str(self.nodes) in command:
                running.append(process)
        return running

    def engines_left(self) -> list[psutil.Process]:
        """Return the engines that still run, after the seconds in which they may end."""
        deadline = time.monotonic() + 15
        while (left := self.engines()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Return the exit code of `svc train`, and its output on one line."""
    _, errors = process.communicate(timeout=ENDS_S)
    return process.returncode, " ".join(errors.split())


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with running_nodes(3) as nodes:
        yield nodes


@pytest.fixture
def place(nodes: RayNodes, tmp_path: Path) -> Place:
    return Place(tmp_path, tmp_path / "recipe.yaml", nodes.address)


def write_recipe(place: Place, workplace: Path, format: Format) -> None:
    place.recipe.write_text(
        f"name: tiny\nbase: {workplace / 'base'}\nformats: [adapter, {format}]\n"
        f"data: {{train: {workplace / 'train.jsonl'}, heldout: {workplace / 'heldout.jsonl'}}}\n"
        "train: {learning_rate: 0.02, batch_size: 8}\nstopping: {curve: false}\n"
        "evaluate: {max_tokens: 8, limit: 8, general: false}\nqualify: {repeats: 1}\n"
    )


def make_here(place: Place, base: Path, format: Format) -> Path:
    """Create a format of the registered adapter on this machine, and return its weight file."""
    merged, int8 = place.folder / "merged", place.folder / "int8"
    merge_adapter(base, place.registry.artifact(VERSION, Format.ADAPTER), merged)
    if format is Format.MERGED:
        return merged / "model.safetensors"
    quantize_to_8_bits(merged, int8, format)
    return int8 / "model.safetensors"


@pytest.mark.parametrize("format", [Format.MERGED, Format.INT8])
def test_ray_trained_version_matches_a_local_version_even_if_a_node_is_lost_during_evaluation(
    format: Format, place: Place, nodes: RayNodes, workplace: Path
) -> None:
    write_recipe(place, workplace, format)
    with place.start() as process:
        place.wait_for_engine(process)
        (node,) = nodes_of_workers(place.nodes)
        nodes.remove(node)
        code, errors = end(process)
    nodes.add()
    assert code == 0, errors
    assert "was lost; restarting on another node" in errors
    assert place.engines_left() == []
    assert workers_left() == []
    assert not list(place.folder.glob("home/cache/capabilities-*")), "this machine was asked for its device"
    assert not [*place.folder.glob("home/**/engine.log"), *place.folder.glob(f"home/**/{format}")]
    place.registry.verify(VERSION, format)  # downloads it
    written = place.registry.artifact(VERSION, format) / "model.safetensors"
    assert written.read_bytes() == make_here(place, workplace / "base", format).read_bytes()


def test_ctrl_c_stops_the_engine_on_a_ray_node_and_keeps_finished_stages(place: Place, workplace: Path) -> None:
    write_recipe(place, workplace, Format.MERGED)
    with place.start() as process:
        place.wait_for_engine(process)
        process.send_signal(signal.SIGINT)
        code, errors = end(process)
    assert code == InterruptedRunError.exit_code, errors
    assert "stage evaluate was interrupted" in errors
    assert place.engines_left() == []
    assert workers_left() == []
    assert list(place.folder.glob("home/runs/*/merge.json"))
