"""Fixtures for a pipeline with fast stand-ins for its stages."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from svc.dataset.schema.example import ChatExample
from svc.engine.device import DeviceCapabilities
from svc.registry.registry import Registry
from svc.registry.tracking import Tracking
from svc.settings.engine import Device, EngineSettings
from svc.settings.settings import Settings
from tests.serving.engine_double import tokenized
from tests.svc.engine.devices import AVX512
from tests.svc.registry.model_folder import write_model
from tests.trainer.conftest import make_example, make_recipe
from tests.trainer.engines import Engines
from tests.trainer.pipeline.stand_ins import TRAIN, Make, Stages
from trainer.base_model.resolve import Base
from trainer.data.fingerprint import fingerprint
from trainer.evaluation.parity import report as parity_module
from trainer.pipeline import evaluation as evaluation_module
from trainer.pipeline import model_stages as stages_module
from trainer.pipeline import registration as registration_module
from trainer.pipeline.examples import Examples
from trainer.pipeline.stages import Pipeline
from trainer.training import sft

_names = (f"pipeline-{number}" for number in itertools.count(1))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    stages = Stages()
    monkeypatch.setattr(sft, "train_model", stages.train_model)
    monkeypatch.setattr(
        evaluation_module, "tokenize_as_trained", lambda folder, examples, kwargs: list(map(tokenized, examples))
    )
    monkeypatch.setattr(parity_module, "make_report", stages.make_report)
    monkeypatch.setattr(registration_module, "report_page", lambda report: f"<p>{report.manifest.id}</p>")
    for name in (
        "check_base",
        "merge_adapter",
        "quantize_to_4_bits",
        "quantize_to_8_bits",
        "export_gguf",
        "check_gguf",
    ):
        monkeypatch.setattr(stages_module, name, getattr(stages, name))
    return stages


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def make(tmp_path: Path, tracking: Tracking, stages: Stages, engines: Engines) -> Iterator[Make]:
    """Return a function that opens a recipe's pipeline. A second call resumes its folder as a new process."""
    name = next(_names)
    base = Base(write_model(tmp_path / "base"), "./base", "Apache-2.0", "sha256:0")
    settings = Settings(home=tmp_path / "home", engine=EngineSettings(device=Device.CPU))

    def make(
        heldout: tuple[ChatExample, ...] | None = None,
        capabilities: DeviceCapabilities = AVX512,
        engine: EngineSettings = settings.engine,
        **sections: Any,
    ) -> Pipeline:
        recipe = make_recipe(**({"name": name, "qualify": {"repeats": 1}} | sections))
        judged = heldout or (make_example("one", "red"), make_example("two", "blue"))
        examples = Examples(TRAIN, judged, fingerprint(TRAIN), fingerprint(judged), (*TRAIN, *judged))
        registry = Registry(settings.home / "models", tracking)
        chosen = settings.model_copy(update={"engine": engine})
        return Pipeline(chosen, capabilities, registry, recipe, base, examples, engines)

    yield make
    assert engines.running == 0


@pytest.fixture
def pipeline(make: Make) -> Pipeline:
    return make()
