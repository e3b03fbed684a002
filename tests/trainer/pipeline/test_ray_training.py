"""Tests which trainings on Ray are refused before the cluster is asked."""

from pathlib import Path
from typing import Any

import pytest

from svc.errors import RecipeError, SettingsError
from svc.settings.engine import RaySettings
from svc.settings.settings import Settings
from tests.trainer.conftest import make_recipe
from trainer.pipeline.ray_training import check_ray, count_workers


@pytest.mark.parametrize(("train", "count"), [({}, 1), ({"devices": 4, "batch_size": 8}, 4)])
def test_number_of_ray_workers_is_derived_from_the_recipe(train: dict[str, Any], count: int) -> None:
    assert count_workers(make_recipe(train=train)) == count


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"devices": [0, 1]}}, "train.devices lists GPUs 0, 1, but Ray chooses"),
        ({"train": {"devices": 3, "batch_size": 4, "gradient_accumulation": 1}}, "cannot be divided among 3 devices"),
        ({"checkpoints": {"keep_epochs": 3}}, "adapters of individual epochs would stay on the nodes"),
        ({"objective": "dpo"}, "preference tuning has not been tested on a Ray cluster"),
    ],
)
def test_recipe_that_ray_workers_cannot_train_is_rejected(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        count_workers(make_recipe(**sections))


def test_training_on_ray_is_refused_without_an_object_store(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, ray=RaySettings(address="127.0.0.1:1"))
    with pytest.raises(SettingsError, match="training on Ray needs an object store") as caught:
        check_ray(settings, make_recipe())
    assert "artifacts.url" in caught.value.todo
