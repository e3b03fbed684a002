"""Tests that trials on several nodes at the same time have the results of trials on this machine.

The nodes are doubles; the processes, their messages, checkpoints and training are real.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna import TrialPruned
from safetensors.torch import load_file

from svc.dataset.schema.example import ChatExample
from svc.engine.device import DeviceCapabilities
from svc.registry.tracking import Tracking
from svc.settings.settings import Settings
from tests.svc.engine.devices import AVX512
from tests.trainer.conftest import make_recipe
from tests.trainer.training.parallel.ray_double import RayDouble
from trainer.base_model.resolve import Base
from trainer.pipeline.examples import Examples
from trainer.recipe.recipe import Recipe
from trainer.sweep import ray_trials
from trainer.sweep.outcome import Status, TrialOutcome
from trainer.sweep.ray_trials import RayTrials
from trainer.sweep.trial_runner import TrialRunner

pytestmark = pytest.mark.matrix

DEVICE: DeviceCapabilities = AVX512.model_copy(update={"cpu_bfloat16": False})
"""A device that trains in float32."""
RATE = "train.learning_rate"
SAME = 1e-6


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayDouble]:
    double = RayDouble(3, DEVICE)
    double.install(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 3.0})
    monkeypatch.setattr(ray_trials, "connected", lambda address: nullcontext())
    yield double
    double.stop()


@pytest.fixture
def recipe() -> Recipe:
    train = {"batch_size": 4, "epochs": 2, "learning_rate": 1e-2}
    return make_recipe(adapter={"rank": 4, "dropout": 0.2}, train=train, checkpoints={"every_steps": 2})


@pytest.fixture
def here(
    tmp_path: Path, tiny_base: Path, examples: list[ChatExample], recipe: Recipe, tracking: Tracking
) -> TrialRunner:
    base, data = Base(tiny_base, "./base", None, "sha256:" + "a" * 64), tuple(examples)
    chosen = Examples(data, data[:5], "", "", ())
    return TrialRunner(tmp_path / "here", "sweep", recipe, base, chosen, tracking, DEVICE.training_type)


@pytest.fixture
def there(tmp_path: Path, here: TrialRunner, double: RayDouble) -> TrialRunner:
    (tmp_path / "store").mkdir()
    settings = Settings.model_validate(
        {
            "artifacts": {"url": (tmp_path / "store").as_uri()},
            "ray": {"address": "head:6379", "folder": str(tmp_path / "nodes")},
        }
    )
    return replace(here, sweeps=tmp_path / "there", cluster=RayTrials(settings, here.recipe, here.base, None))


def test_trials_on_ray_nodes_have_the_same_results_as_local_trials(
    here: TrialRunner, there: TrialRunner, double: RayDouble, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    most, counted = 0, threading.Event()

    def wait(step: int, loss: float) -> None:
        counted.wait(60)

    def prune(step: int, loss: float) -> None:
        nonlocal most
        most = len(double.running)
        counted.set()
        raise TrialPruned(f"at step {step}")

    with there.training(sampled=False) as parallel:
        base = there.base_loss()
        starts: list[tuple[dict[str, Any], Any]] = [({}, wait), ({RATE: 1e-3}, wait), ({RATE: 1e-4}, prune)]
        results: list[Future[TrialOutcome]]
        results = [there.start_trial(number, values, watch) for number, (values, watch) in enumerate(starts, start=1)]
        outcomes = [result.result() for result in results]
    assert (parallel, most) == (3, 3)
    assert [outcome.status for outcome in outcomes] == [Status.COMPLETE, Status.COMPLETE, Status.PRUNED]
    assert base.value == pytest.approx(here.base_loss().value, abs=SAME)
    for outcome in outcomes[:2]:
        local = here.run_trial(outcome.values, lambda step, loss: None)
        assert outcome.heldout_each == pytest.approx(local.heldout_each, abs=SAME)
        assert outcome.watched == pytest.approx(local.watched, abs=SAME)
        one, two = (load_file(runner.adapter(local) / "adapter_model.safetensors") for runner in (here, there))
        assert max(float((one[name] - two[name]).abs().max()) for name in one) <= SAME
    assert "  trial 2: Training: step" in capfd.readouterr().err
    assert double.running == []
    assert not [path for path in (tmp_path / "store" / "checkpoints").rglob("*") if path.is_file()]
    assert not any((tmp_path / "nodes" / "training").iterdir())
