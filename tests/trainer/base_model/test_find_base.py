"""Tests resolving the base that a recipe names."""

import shutil
from pathlib import Path

import pytest

from svc.errors import BaseModelError, IntegrityError, NotFoundError
from svc.settings.settings import Settings
from svc.version import Format
from tests.hub_models.base_models import without_template
from trainer.base_model.find_base import find_base, find_config
from trainer.data.chat_template import load_tokenizer
from trainer.pipeline.stages import Pipeline
from trainer.recipe.named_template import NamedTemplate


@pytest.mark.slow
def test_version_used_as_a_base_resolves_to_its_merged_model(pipeline: Pipeline) -> None:
    version = pipeline.train_version()
    base = find_base(str(version), pipeline.settings)
    assert base.folder == pipeline.registry.artifact(version, Format.MERGED)
    assert (base.origin, base.licence) == (str(version), "Apache-2.0")
    assert base.revision.startswith("sha256:")


@pytest.mark.slow
def test_base_version_with_modified_files_is_rejected(pipeline: Pipeline) -> None:
    version = pipeline.train_version()
    weights = pipeline.registry.artifact(version, Format.MERGED) / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"other")
    with pytest.raises(IntegrityError, match=r"model\.safetensors was changed"):
        find_base(str(version), pipeline.settings)


@pytest.mark.parametrize("base", ["nobody@1", "nobody@production", "@"])
def test_nonexistent_base_version_raises_not_found(tmp_path: Path, base: str) -> None:
    with pytest.raises(NotFoundError):
        find_base(base, Settings(home=tmp_path))


def test_unknown_base_name_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="unknown base model 'no-such-model'"):
        find_base("no-such-model", Settings(home=tmp_path, base_cache=tmp_path))


@pytest.fixture
def untemplated(tiny_base: Path, tmp_path: Path) -> Path:
    return without_template(Path(shutil.copytree(tiny_base, tmp_path / "base")))


def test_error_for_a_base_without_a_chat_template_names_the_recipe_key(untemplated: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="has no chat template") as raised:
        find_base(str(untemplated), Settings(home=tmp_path, base_cache=tmp_path / "cache"))
    assert "set chat_template in the recipe (one of chatml, alpaca, llama-2, zephyr" in raised.value.todo
    with pytest.raises(BaseModelError, match="has no chat template") as raised:
        load_tokenizer(untemplated)
    assert "set chat_template in the recipe" in raised.value.todo


def test_base_without_a_chat_template_uses_the_template_of_the_recipe(
    untemplated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(home=tmp_path, base_cache=tmp_path / "cache")
    base = find_base(str(untemplated), settings, NamedTemplate.ALPACA)
    assert "### Response:" in str(load_tokenizer(base.folder).chat_template)
    assert base.origin == str(untemplated)
    assert find_config(str(untemplated), settings, NamedTemplate.ALPACA) == base.folder
    assert find_base(str(untemplated), settings, NamedTemplate.CHATML).revision != base.revision
    assert "replaces" not in capsys.readouterr().err


def test_notice_is_printed_when_the_chat_template_of_the_base_is_replaced(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(home=tmp_path, base_cache=tmp_path / "cache")
    base = find_base(str(tiny_base), settings, NamedTemplate.ALPACA)
    assert "### Response:" in str(load_tokenizer(base.folder).chat_template)
    assert "the chat template alpaca replaces the base's own" in capsys.readouterr().err


def test_base_config_is_read_from_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    """`svc estimate` needs only config.json."""
    (tmp_path / "config.json").write_text("{}", "utf-8")
    assert find_config(str(tmp_path), Settings(home=tmp_path), NamedTemplate.CHATML) == tmp_path
