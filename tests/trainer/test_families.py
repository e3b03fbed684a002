"""Tests every family of base models, in the form published on the hub, from training to the merged model."""

import json
from itertools import cycle
from pathlib import Path

import pytest

from svc.model_folder.chat_template import read_chat_template
from svc.settings.settings import Settings
from tests.hub_models.base_models import build_base_model
from tests.hub_models.build import build_hub_model
from tests.hub_models.family import DISTINCT, FAMILIES
from tests.hub_models.training import check_merged, train_and_merge
from trainer.base_model.find_base import find_base
from trainer.base_model.resolve import resolve_base
from trainer.data.template_choice import template_text
from trainer.recipe.named_template import NamedTemplate

pytestmark = [pytest.mark.slow]


@pytest.mark.parametrize(
    "family", [family if family in DISTINCT else pytest.param(family, marks=pytest.mark.matrix) for family in FAMILIES]
)
def test_merged_model_of_each_family_keeps_the_files_and_config_of_its_base(tmp_path: Path, family: str) -> None:
    base = resolve_base(str(build_hub_model(tmp_path / "base", family)), tmp_path / "cache").folder
    merged = train_and_merge(base, tmp_path)
    check_merged(base, merged)
    published, config = ((folder / "config.json").read_bytes() for folder in (base, merged))
    if json.loads(published)["torch_dtype"] == "bfloat16":
        assert config == published
    else:
        assert json.loads(config) == json.loads(published) | {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("template", "family"),
    [
        pytest.param(template, family, marks=[pytest.mark.matrix] if template is not NamedTemplate.CHATML else [])
        for template, family in zip(NamedTemplate, cycle(["llama_2", "phi_2"]), strict=False)
    ],
)
def test_merged_model_gets_the_recipe_chat_template_when_its_base_has_none(
    tmp_path: Path, family: str, template: NamedTemplate
) -> None:
    untemplated = build_base_model(tmp_path / "base", family)
    base = find_base(str(untemplated), Settings(base_cache=tmp_path / "cache"), template)
    merged = train_and_merge(base.folder, tmp_path)
    check_merged(base.folder, merged)
    assert read_chat_template(merged) == template_text(template, untemplated)
