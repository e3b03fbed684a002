"""Tests the comparison of estimates with a real training."""

import pytest

from benchmarks.estimate import MEMORY, Case, measure
from svc.engine.device import NumberType
from svc.settings.load import load_settings
from tests.trainer.conftest import make_recipe
from tests.trainer.estimate.configs import cpu_device, even_workload, published
from trainer.base_model.resolve import resolve_base
from trainer.estimate.estimate import estimate_device
from trainer.pipeline.estimate import compare_with_real, estimate_metrics
from trainer.recipe.adapter import Method
from trainer.training.summary import TrainingSummary

SUMMARY = TrainingSummary(steps=1, tokens=1, tokens_per_second=1, seconds=9, peak_memory=5)


def test_estimate_is_printed_and_stored_with_the_measured_values(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe()
    expected = estimate_device(recipe, published("llama-2-7b"), even_workload(9, 99, recipe), cpu_device(), 99)
    compared = compare_with_real(expected, SUMMARY)
    assert "(estimated" in " ".join(capsys.readouterr().err.split())
    assert estimate_metrics(compared) == {
        "estimate.memory": expected.memory,
        "estimate.memory_real": 5,
        "estimate.seconds": expected.seconds,
        "estimate.seconds_real": 9,
    }


@pytest.mark.matrix
@pytest.mark.parametrize("method", [Method.LORA, Method.FULL])
def test_estimated_memory_is_close_to_the_memory_used_by_a_real_training_run(method: Method) -> None:
    base = resolve_base("smollm2-135m-instruct", load_settings().base_cache).folder
    (measured,) = measure([Case(method, 4, 2, base, NumberType.BFLOAT16)], cpu_device())
    assert abs(measured.memory_ratio - 1) < MEMORY
