"""Tests a pipeline whose stages run on a cluster. The cluster is a folder next to this machine's home."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from svc.errors import InterruptedRunError
from svc.registry.objects import ObjectStore
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.settings.storage import ArtifactSettings
from svc.version import Format
from tests.svc.engine.devices import AVX512
from tests.trainer.pipeline.stand_ins import Make, Stages
from trainer.model.run_record import MachineRecord
from trainer.pipeline import stages as stages_module
from trainer.pipeline.model_stages import ModelStages
from trainer.pipeline.ray_stages import store_weights
from trainer.pipeline.run_folder import RemoteResult
from trainer.pipeline.stages import Pipeline
from trainer.recipe.stage import WRITE_STAGES, Stage
from trainer.report.report import gather_report
from trainer.training.parallel.ray_worker import NodeFacts
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints

pytestmark = pytest.mark.slow

MACHINE = MachineRecord(processor="node", cores=1, memory=1, gpus=(), system="Linux", python="3.11")
NODE = NodeFacts("0", "10.0.0.1", version("tuneserve"), AVX512, MACHINE)


class Elsewhere:
    """Stands in for `RayStages`: runs stages in another folder of this machine."""

    def __init__(
        self, settings: Settings, models: ModelStages, checkpoints: SharedCheckpoints, node: NodeFacts
    ) -> None:
        self._here = models.evaluation.run
        self._there = self._here.at(settings.home.parent / "node")
        self._models = replace(models, evaluation=replace(models.evaluation, run=self._there))
        self._objects = ObjectStore(str(settings.artifacts.url))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def share(self) -> None:
        pass

    def check(self) -> None:
        pass

    @contextmanager
    def training(self, *, fetches: bool) -> Iterator[Any]:
        yield SimpleNamespace(size=1, capabilities=AVX512, trained=())

    def run(self, stage: Stage) -> RemoteResult:
        if not self._there.adapter.exists():
            shutil.copytree(self._here.adapter, self._there.adapter)
        self._there.copy_results(self._here.results())
        result = self._models.steps[stage].work()
        written = [format for format, writes in WRITE_STAGES.items() if writes is stage]
        stored = [store_weights(self._objects, self._models.recipe.name, self._there, format) for format in written]
        return RemoteResult(result, stored[0] if stored else None)


@pytest.fixture
def pipeline(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.setattr(stages_module, "RayStages", Elsewhere)
    url = (tmp_path / "store").as_uri()
    (tmp_path / "store").mkdir()
    here = make()
    settings = here.settings.model_copy(update={"artifacts": ArtifactSettings(url=url)})
    registry = Registry(here.registry.models, here.registry.tracking, ObjectStore(url))
    return replace(here, settings=settings, registry=registry, node=NODE)


def test_version_is_registered_without_local_weights_if_they_are_in_the_object_store(
    pipeline: Pipeline, stages: Stages
) -> None:
    version = pipeline.train_version()
    folder = pipeline.registry.folder(version)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["adapter", "reference"]
    assert not (pipeline.run.merged.exists() or pipeline.run.weights(Format.GPTQ).exists())
    for format in (Format.MERGED, Format.GPTQ):
        assert pipeline.registry.format(version, format).fingerprint is not None
        pipeline.registry.verify(version, format)  # downloads it
        assert (folder / format).is_dir()
    assert stages.ran == [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE]


def test_finished_local_stages_are_not_repeated_when_the_run_continues_on_a_ray_cluster(
    pipeline: Pipeline, stages: Stages
) -> None:
    stages.broken.add(Stage.QUANTIZE)
    with pytest.raises(InterruptedRunError, match="stage quantize was interrupted"):
        pipeline.train_version()
    stages.broken.clear()
    pipeline.train_version()
    assert stages.ran == [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE, Stage.QUANTIZE]


def test_run_started_on_a_ray_cluster_continues_locally_with_weights_from_the_object_store(
    pipeline: Pipeline, stages: Stages
) -> None:
    stages.broken.add(Stage.QUANTIZE)
    with pytest.raises(InterruptedRunError, match="stage quantize was interrupted"):
        pipeline.train_version()
    stages.broken.clear()
    version = replace(pipeline, node=None).train_version()
    assert stages.ran == [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE, Stage.QUANTIZE]
    assert (pipeline.registry.folder(version) / Format.MERGED).is_dir()


def test_run_record_of_a_version_trained_on_ray_describes_the_training_node(pipeline: Pipeline) -> None:
    version = pipeline.train_version()
    assert gather_report(pipeline.registry, version).run.machine == MACHINE
