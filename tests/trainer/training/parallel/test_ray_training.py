"""Tests that workers on several nodes train as processes of this machine do, and that they stop, die and resume
together. The nodes are doubles; the processes, their messages, checkpoints and gradients are real.
"""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.torch import load_file

from svc.dataset.schema.example import ChatExample
from svc.engine.device import DeviceCapabilities, NumberType
from svc.errors import InterruptedRunError, TrainingError
from svc.registry.objects import ObjectStore
from svc.settings.engine import RaySettings
from tests.svc.engine.devices import AVX512
from tests.trainer.conftest import make_recipe
from tests.trainer.training.parallel.ray_double import RayDouble
from trainer.recipe.recipe import Recipe
from trainer.training.parallel.device_processes import DeviceProcesses
from trainer.training.parallel.devices import TrainingDevice
from trainer.training.parallel.ray_processes import RayProcesses, choose_kind
from trainer.training.parallel.ray_worker import SharedRun
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints
from trainer.training.parallel.shared_folders import share_base
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData, TrainingSummary

pytestmark = pytest.mark.slow

STEPS = 12
DEVICE: DeviceCapabilities = AVX512.model_copy(update={"cpu_bfloat16": False})
"""A device that trains in float32."""


def recipe() -> Recipe:
    train = {"batch_size": 4, "epochs": 4, "learning_rate": 1e-2}
    return make_recipe(
        adapter={"rank": 4, "dropout": 0.2}, train=train, checkpoints={"every_steps": 2}, stopping={"curve": False}
    )


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each process one thread: results depend on the number of threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def data(examples: list[ChatExample]) -> TrainingData:
    return TrainingData(examples, examples[:5])


@dataclass
class Machine:
    """A machine that trains on a cluster.

    Attributes:
        reported: the steps whose losses it received.
        announced: the names of the checkpoints of which it heard.
    """

    folder: Path
    base: Path
    data: TrainingData
    reported: list[int] = field(default_factory=list)
    announced: list[str] = field(default_factory=list)
    on_report: Callable[[int, object], None] = lambda step, figures: None

    def train(self, on_checkpoint: Callable[[str], None] = lambda name: None) -> TrainingSummary:
        (self.folder / "store").mkdir(exist_ok=True)
        url = (self.folder / "store").as_uri()
        settings = RaySettings(folder=self.folder / "nodes", wait_s=0.5)
        name = share_base(ObjectStore(url), self.base, "sha256:" + "a" * 64)
        run = SharedRun(url, "tiny-1", name, b"{}", settings.folder, "")
        checkpoints, out = self.folder / "checkpoints", self.folder / "trained"
        shared = SharedCheckpoints(ObjectStore(url), "tiny-1", checkpoints, self.folder / "mlflow.json")

        def announce(path: Path) -> None:
            self.announced.append(path.name)
            on_checkpoint(path.name)

        def report(step: int, figures: object) -> None:
            self.reported.append(step)
            self.on_report(step, figures)

        with RayProcesses(settings, choose_kind(settings, {}), 2, run, shared) as processes:
            return train_model(
                self.base,
                self.data,
                recipe(),
                out,
                checkpoints,
                report,
                number_type=processes.capabilities.training_type,
                on_checkpoint=announce,
                processes=processes,
            )

    def difference(self, other: Path) -> float:
        one, two = (load_file(path / "trained" / "adapter_model.safetensors") for path in (self.folder, other))
        return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, data: TrainingData) -> Path:
    """Return the folder of a run in two processes of this machine."""
    folder = tmp_path_factory.mktemp("here")
    processes = DeviceProcesses((TrainingDevice("the CPU"),) * 2)
    out, checkpoints = folder / "trained", folder / "checkpoints"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        train_model(tiny_base, data, recipe(), out, checkpoints, number_type=NumberType.FLOAT32, processes=processes)
    return folder


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayDouble]:
    double = RayDouble(3, DEVICE)
    double.install(monkeypatch)
    yield double
    double.stop()


@pytest.fixture
def machine(tmp_path: Path, tiny_base: Path, data: TrainingData, ray: RayDouble) -> Machine:
    return Machine(tmp_path, tiny_base, data)


@pytest.mark.matrix
def test_workers_on_two_ray_nodes_train_the_same_adapter_as_two_local_processes(
    here: Path, machine: Machine, ray: RayDouble, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = machine.train()
    assert machine.difference(here) <= 1e-6
    assert (summary.steps, summary.devices) == (STEPS, 2)
    assert machine.reported == list(range(1, STEPS + 1))
    assert machine.announced == [f"step-{step:08d}" for step in range(2, STEPS + 1, 2)]
    assert capfd.readouterr().err.count(f"Training: step {STEPS}/{STEPS}") == 1
    assert ray.running == []
    assert list((machine.folder / "nodes" / "training").iterdir()) == []


@pytest.mark.matrix
@pytest.mark.parametrize("rank", [0, 1])
def test_training_continues_on_a_third_ray_node_when_a_node_is_lost(
    rank: int, here: Path, machine: Machine, ray: RayDouble, capfd: pytest.CaptureFixture[str]
) -> None:
    def lose(name: str) -> None:
        if name == "step-00000006" and ray.nodes[rank].alive:
            ray.remove(ray.nodes[rank])

    machine.train(lose)
    assert machine.difference(here) <= 1e-6
    errors = " ".join(capfd.readouterr().err.split())
    assert f"rank {rank} of 2 on node 127.0.0.1 was lost; restarting all workers" in errors
    assert f"resuming from step 6 of {STEPS}" in errors
    assert ray.running == []


@pytest.mark.matrix
def test_run_stopped_by_a_signal_leaves_no_worker_and_continues_with_the_same_result(
    here: Path, machine: Machine, ray: RayDouble, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(name: str) -> None:
        if name == "step-00000006":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRunError, match=rf"^stopped by SIGINT after step \d+ of {STEPS}"):
        machine.train(interrupt)
    assert ray.running == []
    stopped = int(machine.announced[-1].removeprefix("step-"))
    machine.train()
    assert f"resuming from step {stopped} of {STEPS}" in capfd.readouterr().err
    assert machine.difference(here) <= 1e-6


@pytest.mark.matrix
def test_run_fails_when_workers_are_lost_three_times_without_a_new_checkpoint(machine: Machine, ray: RayDouble) -> None:
    lost = list[int]()

    def lose(step: int, figures: object) -> None:
        lost.append(step)
        ray.add()
        ray.remove(next(node for node in ray.nodes if node.alive and node.reserved))

    machine.on_report = lose
    with pytest.raises(TrainingError, match="was lost"):
        machine.train()
    assert lost == [1, 1, 1]


def test_training_is_refused_when_the_cluster_has_too_few_nodes(machine: Machine, ray: RayDouble) -> None:
    for node in ray.nodes[:2]:
        ray.remove(node)
    with pytest.raises(TrainingError, match=r"no free resources for 2 workers .* its nodes have capacity for only 1"):
        machine.train()
