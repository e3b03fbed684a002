"""Tests that all readers of model folders understand a base with a different chat template."""

import json
import shutil
from pathlib import Path

import pytest

from svc.model_folder.chat_template import choose_template_kwargs, read_chat_template, write_template_kwargs
from trainer.base_model.content import hash_files, model_files
from trainer.base_model.other_template import folder_with_template, revision_with_template
from trainer.base_model.resolve import resolve_base
from trainer.data.chat_template import load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "nowhere"])
def test_replacing_the_chat_template_leaves_all_other_files_unchanged(base: Path, tmp_path: Path, place: str) -> None:
    own, config = base / "chat_template.jinja", base / "tokenizer_config.json"
    if place == "tokenizer_config.json":
        config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"chat_template": own.read_text("utf-8")}))
    if place != "chat_template.jinja":
        own.unlink()
    before = {path.name: hash_files([path]) for path in model_files(base)}
    folder = folder_with_template(base, TEMPLATE, tmp_path / "cache")
    after = {path.name: hash_files([path]) for path in model_files(folder)}
    assert {name for name in {*before, *after} if before.get(name) != after.get(name)} <= {own.name, config.name}
    assert load_tokenizer(folder).chat_template == read_chat_template(folder) == TEMPLATE
    assert "chat_template" not in json.loads((folder / config.name).read_text("utf-8"))
    assert {path.name: hash_files([path]) for path in model_files(base)} == before


def test_arguments_of_a_replaced_chat_template_are_dropped(base: Path, tmp_path: Path) -> None:
    write_template_kwargs(base, {"enable_thinking": True})
    folder = folder_with_template(base, TEMPLATE, tmp_path / "cache")
    assert choose_template_kwargs(folder, None) == {}


def test_folder_with_a_replaced_template_is_rebuilt_only_when_the_template_or_base_changes(
    base: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = folder_with_template(base, TEMPLATE, cache)
    assert folder_with_template(base, TEMPLATE, cache) == first
    assert folder_with_template(base, TEMPLATE + " ", cache) != first
    (base / "generation_config.json").write_text('{"eos_token_id": 3}', "utf-8")
    (base / "README.md").write_text("---\nlicense: mit\n---\n", "utf-8")
    second = folder_with_template(base, TEMPLATE, cache)
    assert (second / "README.md").is_file()
    assert resolve_base(str(second), cache).licence == "mit"


def test_base_revision_identifies_base_and_template() -> None:
    revisions = {revision_with_template(base, template) for base in ("a", "b") for template in ("x", "y")}
    assert len(revisions) == 4
    assert revision_with_template("sha256:ab", "x").startswith("sha256:ab+template:")
