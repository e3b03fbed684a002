"""Tests the default learning rate by method and by the base's width."""

import pytest

from tests.trainer.conftest import make_recipe
from tests.trainer.estimate.configs import FOLDER
from trainer.model.config import read_width

_CUSTOMARY = {
    "llama-3.2-1b": {"lora": (1e-4, 1e-3), "full": (1e-5, 1e-4)},
    "llama-3.1-8b": {"lora": (1e-4, 3e-4), "qlora": (1e-4, 3e-4), "full": (1e-5, 3e-5)},
    "phi-4": {"qlora": (1e-4, 2e-4), "full": (1e-5, 3e-5)},
    "r1-qwen-32b": {"qlora": (1e-4, 3e-4)},
    "llama-2-70b": {"qlora": (1e-4, 3e-4), "full": (1e-5, 2e-5)},
}
"""Lowest and highest learning rate in papers and in the recipes of other libraries (docs/training.md)."""


@pytest.mark.parametrize(
    ("name", "method", "low", "high"),
    [(name, method, *bounds) for name, of in _CUSTOMARY.items() for method, bounds in of.items()],
)
def test_default_learning_rate_is_within_the_usual_range_for_published_models(
    name: str, method: str, low: float, high: float
) -> None:
    assert low <= make_recipe(method=method).learning_rate(read_width(FOLDER / name)) <= high


@pytest.mark.parametrize(("method", "rate"), [("lora", 5e-4), ("full", 5e-5), ("adalora", 1e-2), ("vera", 6e-2)])
@pytest.mark.parametrize("width", [64, 576])
def test_default_learning_rate_is_the_same_for_small_base_models_of_different_widths(
    method: str, rate: float, width: int
) -> None:
    assert make_recipe(method=method).learning_rate(width) == rate


@pytest.mark.parametrize(
    ("objective", "method", "width", "low", "high"),
    [
        ("dpo", "lora", 896, 5e-6, 5e-5),
        ("dpo", "lora", 4096, 5e-6, 2e-4),
        ("dpo", "full", 896, 5e-7, 1e-6),
        ("kto", "qlora", 2560, 5e-6, 2e-4),
        ("orpo", "lora", 768, 8e-5, 1e-4),
        ("orpo", "full", 6144, 1e-6, 5e-6),
    ],
)
def test_default_learning_rate_for_preference_training_is_within_the_published_range(
    objective: str, method: str, width: int, low: float, high: float
) -> None:
    assert low <= make_recipe(objective=objective, method=method).learning_rate(width) <= high


def test_learning_rate_set_in_the_recipe_overrides_the_default_for_the_base_model() -> None:
    recipe = make_recipe(train={"learning_rate": 7e-4})
    assert recipe.with_learning_rate(8192) == recipe


def test_resolved_learning_rate_is_recorded_in_the_recipe() -> None:
    recipe = make_recipe(method="full").with_learning_rate(4096)
    assert recipe.train.learning_rate == 1.9e-5
    assert recipe.flat()["train.learning_rate"] == "1.9e-05"
    assert recipe.model_dump(exclude_unset=True)["train"] == {"learning_rate": 1.9e-5}
