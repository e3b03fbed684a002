"""Tests that the stages after training run on nodes as they do on this machine. The nodes and the engine are doubles;
the processes, the weights and the object store are real.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import set_seed

from svc.dataset.schema.example import ChatExample
from svc.engine.device import DeviceCapabilities
from svc.engine.engine import Engine
from svc.errors import TrainingError
from svc.registry.files import FileRecord, record_files
from svc.registry.objects import ObjectStore
from svc.settings.engine import Device, EngineSettings, RaySettings
from svc.settings.settings import Settings
from svc.settings.storage import ArtifactSettings
from svc.version import Format
from tests.builders.peft_adapters import random_adapter
from tests.svc.engine.devices import AVX512, HOPPER
from tests.trainer.conftest import make_recipe
from tests.trainer.engines import Engines
from tests.trainer.training.parallel.ray_double import RayDouble
from trainer.base_model.resolve import Base
from trainer.data.fingerprint import fingerprint
from trainer.model.run_record import MachineRecord
from trainer.pipeline import ray_stages
from trainer.pipeline.evaluation import QualifiedQuantized, RunEvaluation
from trainer.pipeline.examples import Examples
from trainer.pipeline.model_stages import ModelStages
from trainer.pipeline.ray_stages import RayStages, fetch_stored
from trainer.pipeline.ray_training import choose_stage_kind
from trainer.pipeline.run_folder import RemoteResult, Run
from trainer.recipe.stage import Stage
from trainer.training.parallel.ray_worker import NodeFacts
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints
from trainer.training.summary import TrainingSummary

pytestmark = pytest.mark.slow

WRITING = (Stage.MERGE, Stage.QUANTIZE_INT8)


def launch_double(folder: Path) -> Engine:
    """Create an engine double, in any process."""
    return Engines()(folder)


@dataclass(frozen=True)
class Machine:
    """A machine with a trained adapter."""

    settings: Settings
    models: ModelStages

    @property
    def run(self) -> Run:
        return self.models.evaluation.run

    @property
    def objects(self) -> ObjectStore:
        return ObjectStore(str(self.settings.artifacts.url))

    @property
    def checkpoints(self) -> SharedCheckpoints:
        return SharedCheckpoints(self.objects, self.run.folder.name, self.run.checkpoints, self.run.tracking)

    def cluster(self, capabilities: DeviceCapabilities = AVX512) -> RayStages:
        record = MachineRecord(processor="CPU", cores=1, memory=1, gpus=(), system="Linux", python="3.11")
        node = NodeFacts("0", "10.0.0.1", version("tuneserve"), capabilities, record)
        return RayStages(self.settings, self.models, self.checkpoints, node)

    def run_on(self, cluster: RayStages, stage: Stage) -> RemoteResult:
        result = cluster.run(stage)
        self.run.save(stage, result)
        return result

    def run_here(self, stage: Stage) -> None:
        self.run.save(stage, self.models.steps[stage].work())

    def files(self, format: Format) -> tuple[FileRecord, ...]:
        return record_files(self.run.folder, self.run.weights(format))


@pytest.fixture
def machine(tmp_path: Path, tiny_base: Path, examples: list[ChatExample]) -> Machine:
    return make_machine(tmp_path / "machine", tiny_base, examples, Format.MERGED, Format.INT8)


def make_machine(folder: Path, base: Path, examples: list[ChatExample], *formats: Format) -> Machine:
    (folder / "store").mkdir(parents=True)
    settings = Settings(
        home=folder / "home",
        artifacts=ArtifactSettings(url=(folder / "store").as_uri()),
        engine=EngineSettings(device=Device.CPU),
        ray=RaySettings(address="127.0.0.1:1", folder=folder / "nodes", wait_s=0.5),
    )
    recipe = make_recipe(formats=list(formats), qualify={"repeats": 1}, evaluate={"general": False})
    train, heldout = tuple(examples[:8]), tuple(examples[8:])
    of_run = Examples(train, heldout, fingerprint(train), fingerprint(heldout), (*train, *heldout))
    of_base = Base(base, "./base", None, "sha256:" + "a" * 64)
    run = Run.of(settings.home / "runs", recipe, of_base, of_run)
    set_seed(0)
    random_adapter(base, run.adapter)
    run.tracking.write_bytes(b"{}")
    run.save(Stage.TRAIN, TrainingSummary(1, 1, 1.0, 1.0))
    evaluation = RunEvaluation(
        settings=settings,
        capabilities=AVX512,
        base=of_base,
        run=run,
        recipe=recipe,
        heldout=heldout,
        questions=None,
        launch=launch_double,
    )
    return Machine(settings, ModelStages(recipe, evaluation, train))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayDouble]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    double = RayDouble(2, AVX512)
    double.install(monkeypatch)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray_stages, "connected", nullcontext)
    yield double
    double.stop()


@pytest.mark.matrix
def test_ray_node_writes_the_same_weights_as_a_local_run_and_stores_them_in_the_object_store(
    machine: Machine, ray: RayDouble, tmp_path: Path, tiny_base: Path, examples: list[ChatExample]
) -> None:
    here = make_machine(tmp_path / "here", tiny_base, examples, Format.MERGED, Format.INT8)
    with machine.cluster() as cluster:
        for stage in WRITING:
            machine.run_on(cluster, stage)
            here.run_here(stage)
    for stage, format in zip(WRITING, (Format.MERGED, Format.INT8), strict=True):
        stored = machine.run.stored_weights(stage)
        assert stored is not None
        assert stored.files == here.files(format)
        assert machine.objects.lacks("tiny", stored.files) == []
        assert not machine.run.weights(format).exists()
    assert ray.running == []
    assert list((machine.settings.ray.folder / "training").iterdir()) == []


@pytest.mark.matrix
def test_stage_restarts_on_another_node_and_reuses_earlier_results_when_the_first_node_is_lost(
    machine: Machine, ray: RayDouble, capfd: pytest.CaptureFixture[str]
) -> None:
    with machine.cluster() as cluster:
        for stage in WRITING:
            machine.run_on(cluster, stage)
        ray.remove(ray.nodes[0])
        result = machine.run_on(cluster, Stage.QUALIFY_INT8).result
    assert isinstance(result, QualifiedQuantized)
    assert result.evaluation.examples == len(machine.models.evaluation.heldout)
    assert "was lost before its work began; restarting on another node" in " ".join(capfd.readouterr().err.split())


@pytest.mark.matrix
def test_merge_of_an_unregistered_model_is_repeated_when_its_node_is_lost(
    tmp_path: Path, tiny_base: Path, examples: list[ChatExample], ray: RayDouble
) -> None:
    machine = make_machine(tmp_path / "machine", tiny_base, examples, Format.INT8)
    with machine.cluster() as cluster:
        assert machine.run_on(cluster, Stage.MERGE).weights is None
        ray.remove(ray.nodes[0])
        assert machine.run_on(cluster, Stage.QUANTIZE_INT8).weights is not None


def test_weights_of_local_stages_are_uploaded_when_the_run_continues_on_a_ray_cluster(
    machine: Machine, ray: RayDouble
) -> None:
    for stage in WRITING:
        machine.run_here(stage)
    machine.cluster().share()
    for stage, format in zip(WRITING, (Format.MERGED, Format.INT8), strict=True):
        stored = machine.run.stored_weights(stage)
        assert stored is not None
        assert stored.files == machine.files(format)
        assert machine.objects.lacks("tiny", stored.files) == []


def test_stage_is_repeated_when_its_weights_are_missing_from_the_object_store(machine: Machine, ray: RayDouble) -> None:
    machine.run_here(Stage.MERGE)
    machine.cluster().share()
    machine.run.fresh(machine.run.merged)
    objects = machine.objects
    objects.delete(objects.keys("files"))
    machine.cluster().share()
    assert not machine.run.done(Stage.MERGE)
    assert machine.run.done(Stage.TRAIN)


def test_weights_are_downloaded_when_a_run_started_on_a_ray_cluster_continues_locally(machine: Machine) -> None:
    machine.run_here(Stage.MERGE)
    machine.cluster().share()
    written = machine.files(Format.MERGED)
    machine.run.fresh(machine.run.merged)
    fetch_stored(machine.run, machine.models.recipe, machine.objects, machine.checkpoints)
    assert machine.files(Format.MERGED) == written
    assert machine.run.stored_weights(Stage.MERGE) is None


def test_stage_fails_when_its_node_has_different_devices_from_the_node_used_for_checks(
    machine: Machine, ray: RayDouble
) -> None:
    with machine.cluster(HOPPER) as cluster, pytest.raises(TrainingError, match=r"different devices: .*H100"):
        cluster.run(Stage.MERGE)


@pytest.mark.parametrize(
    ("resources", "engine", "bundle"),
    [
        ({"CPU": 8.0}, {}, {"CPU": 2.0}),
        ({"CPU": 8.0}, {"cores": 4}, {"CPU": 4.0}),
        ({"CPU": 8.0, "GPU": 4.0}, {"tensor_parallel": 4}, {"CPU": 2.0, "GPU": 4.0}),
    ],
)
def test_pipeline_stage_on_ray_reserves_the_resources_of_an_engine(
    resources: dict[str, float], engine: dict[str, int], bundle: dict[str, float], tmp_path: Path
) -> None:
    settings = Settings(home=tmp_path, engine=EngineSettings(**engine), ray=RaySettings(cpus=2))
    assert choose_stage_kind(settings, resources).resources == bundle
