"""Every family of base models, in the form published on the hub, from training to the merged model."""

import json
from pathlib import Path

import pytest

from tests.hub_models.build import build_hub_model
from tests.hub_models.family import FAMILIES
from tests.hub_models.training import check_merged, train_and_merge

pytestmark = [pytest.mark.slow]


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_model_has_the_files_and_config_of_its_base_when_they_are_as_published(
    tmp_path: Path, family: str
) -> None:
    base = build_hub_model(tmp_path / "base", family)
    merged = train_and_merge(base, tmp_path)
    check_merged(base, merged)
    published, config = ((folder / "config.json").read_bytes() for folder in (base, merged))
    if json.loads(published)["torch_dtype"] == "bfloat16":
        assert config == published
    else:
        assert json.loads(config) == json.loads(published) | {"torch_dtype": "bfloat16"}
