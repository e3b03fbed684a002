"""A recipe that is wrong says where and how, before anything is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from svc.errors import RecipeError
from tests.svc.json_values import json_values, mappings_of
from trainer.recipe.file import load_recipe, recipe_keys
from trainer.recipe.sections import Recipe

GOOD: dict[str, Any] = {"name": "tiny", "base": "org/model", "data": {"train": "t.jsonl", "heldout": "h.jsonl"}}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe: the smallest good one, with changes."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(GOOD | changes), "utf-8")
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_three_keys_are_enough(write: Write) -> None:
    recipe = load_recipe(write())
    assert (recipe.name, recipe.base) == ("tiny", "org/model")
    assert recipe.train == Recipe.model_fields["train"].default


def test_what_is_said_is_taken(write: Write) -> None:
    recipe = load_recipe(write(train={"epochs": 2.5}, adapter={"rank": 4}, evaluate={"limit": 10}))
    assert (recipe.train.epochs, recipe.adapter.rank, recipe.evaluate.limit) == (2.5, 4, 10)
    assert recipe.alpha == 8


def test_paths_are_relative_to_the_recipe(
    write: Write, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(base="./base")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    recipe = load_recipe(path)
    assert recipe.data.train == (str(tmp_path / "t.jsonl"),)
    assert recipe.base == str(tmp_path / "base")


def test_several_sources_are_a_list_and_hub_datasets_are_no_paths(write: Write, tmp_path: Path) -> None:
    data = load_recipe(write(data={"train": ["a.csv", "hf:org/name", "folder"]})).data
    assert data.train == (str(tmp_path / "a.csv"), "hf:org/name", str(tmp_path / "folder"))
    assert (data.heldout, data.general) == (None, None)


def test_paths_from_the_root_and_from_home_stay_what_they_are(write: Write) -> None:
    recipe = load_recipe(write(base="~/model.gguf", data={"train": "/data/t.jsonl", "heldout": "~/h.jsonl"}))
    assert recipe.base == str(Path.home() / "model.gguf")
    assert recipe.data.train == ("/data/t.jsonl",)
    assert recipe.data.heldout == (str(Path.home() / "h.jsonl"),)


@pytest.mark.parametrize("base", ["smollm2-135m-instruct", "org/model", "tiny@3"])
def test_a_base_that_is_no_path_stays_what_it_is(write: Write, base: str) -> None:
    assert load_recipe(write(base=base)).base == base


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"trian": {}}, "unknown key 'trian' (did you mean 'train'?)"),
        ({"train": {"learning_rat": 1}}, "unknown key 'train.learning_rat' (did you mean 'train.learning_rate'?)"),
        ({"adapter": {"ranks": 4}}, "unknown key 'adapter.ranks' (did you mean 'adapter.rank'?)"),
        ({"data": {**GOOD["data"], "qqqqqqqq": 1}}, "unknown key 'data.qqqqqqqq'"),
        ({"train": {"epochs": "two"}}, "'train.epochs' is 'two': "),
        ({"train": {"epochs": 0}}, "'train.epochs' is 0: input should be greater than 0"),
        ({"train": {"batch_size": 1.5}}, "'train.batch_size' is 1.5"),
        ({"train": {"learning_rate": float("nan")}}, "'train.learning_rate' is nan"),
        ({"train": {"learning_rate": float("inf")}}, "'train.learning_rate' is inf"),
        ({"train": None}, "'train' is None"),
        ({"train": []}, "'train' is []"),
        ({"adapter": {"rank": 0}}, "'adapter.rank' is 0"),
        ({"quantize": {"group_size": 48}}, "'quantize.group_size' is 48: input should be 32, 64 or 128"),
        ({"name": "My Model"}, "'name' is 'My Model'"),
        ({"name": "a/../b"}, "'name' is 'a/../b'"),
        ({"base": ""}, "'base' is ''"),
        ({"base": "~nobody-of-this-name/x"}, "'base' is '~nobody-of-this-name/x'"),
        ({"data": {"heldout": "h.jsonl"}}, "'data.train' is missing"),
        ({"data": {"train": []}}, "'data.train' is []"),
        ({"data": {"train": ["t.jsonl", 3]}}, "'data.train.1' is 3"),
        ({"data": {"train": "t.jsonl", "heldout_share": 1}}, "'data.heldout_share' is 1"),
    ],
    ids=str,
)
def test_a_wrong_key_is_named_with_its_value(write: Write, changes: dict[str, Any], text: str) -> None:
    told = refusal(write(**changes))
    assert text in told
    assert "see docs/recipe.md" in told


def test_all_mistakes_are_told_at_once(write: Write) -> None:
    told = refusal(write(trian={}, adapter={"rank": 0}))
    assert "'trian'" in told
    assert "'adapter.rank'" in told


def test_noise_on_packed_rows_is_refused(write: Write) -> None:
    with pytest.raises(RecipeError, match="neftune_alpha with train"):
        load_recipe(write(train={"packing": True, "neftune_alpha": 5}))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"cannot open recipe {tmp_path / 'none.yaml'}: No such file" in refusal(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "holds None"),
        (b"- a", "holds ['a']"),
        (b"just text", "holds 'just text'"),
        (b"name: [", "is not YAML"),
        (b"name: caf\xe9", "is not YAML"),
        (b"name: 2024-13-45", "is not YAML"),
        (b"name: !!python/object:os.system x", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert text in refusal(path)


def test_set_changes_a_key(write: Write) -> None:
    recipe = load_recipe(write(train={"epochs": 9, "seed": 5}), ("train.epochs=2", "name=other", "adapter.rank=8"))
    assert (recipe.train.epochs, recipe.train.seed, recipe.name, recipe.adapter.rank) == (2, 5, "other", 8)


def test_the_last_set_of_a_key_wins(write: Write) -> None:
    assert load_recipe(write(), ("train.epochs=2", "train.epochs=3")).train.epochs == 3


def test_set_takes_yaml_values(write: Write) -> None:
    recipe = load_recipe(write(), ("evaluate.limit=null", "qualify.restart=no", "train.learning_rate=2.0e-4"))
    assert (recipe.evaluate.limit, recipe.qualify.restart, recipe.train.learning_rate) == (None, False, 2e-4)


def test_set_takes_a_learning_rate_as_people_write_it(write: Write) -> None:
    assert load_recipe(write(), ("train.learning_rate=2e-4",)).train.learning_rate == 2e-4


def test_a_path_that_is_set_is_relative_to_the_recipe_too(write: Write, tmp_path: Path) -> None:
    assert load_recipe(write(), ("data.train=other.jsonl",)).data.train == (str(tmp_path / "other.jsonl"),)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.epochs", "--set 'train.epochs'"),
        ("=2", "--set '=2'"),
        ("train..epochs=2", "--set 'train..epochs=2'"),
        ("name.x=2", "name is no section"),
        ("train.epochs=[", "'[' is not a YAML value"),
        ("train.epochs=2024-13-45", "'2024-13-45' is not a YAML value"),
        ("train.epochs=two", "'train.epochs' is 'two'"),
        ("train.epoch=2", "unknown key 'train.epoch' (did you mean 'train.epochs'?)"),
        ("train=5", "'train' is 5"),
    ],
)
def test_a_wrong_set_is_named(write: Write, override: str, text: str) -> None:
    assert text in refusal(write(), override)


def test_keys_are_all_leaves() -> None:
    dumped = Recipe.model_validate(GOOD).model_dump()
    leaves = {
        f"{key}.{inner}" if inner else key
        for key, value in dumped.items()
        for inner in (value if isinstance(value, dict) else [""])
    }
    assert set(recipe_keys()) == leaves


@given(mappings_of(recipe_keys()))
def test_any_mapping_is_a_recipe_or_a_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(GOOD | content), "utf-8")
    try:
        recipe = load_recipe(path)
    except RecipeError:
        return
    assert all(source.startswith(("/", "hf:")) for source in recipe.data.train)


@given(st.sampled_from(recipe_keys()), json_values)
def test_any_value_of_a_key_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    section, _, inner = key.rpartition(".")
    change = {inner: value} if not section else {section: GOOD.get(section, {}) | {inner: value}}
    path = tmp_path_factory.getbasetemp() / "value.yaml"
    path.write_text(yaml.safe_dump(GOOD | change), "utf-8")
    try:
        load_recipe(path)
    except RecipeError as error:
        assert key in error.wrong  # noqa: PT017 - either outcome is right


@given(st.text(max_size=30) | st.from_regex(r"[a-z.]{1,12}=.{0,12}"))
def test_any_set_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, override: str) -> None:
    path = tmp_path_factory.getbasetemp() / "set.yaml"
    path.write_text(yaml.safe_dump(GOOD), "utf-8")
    try:
        load_recipe(path, (override,))
    except RecipeError as error:
        assert error.wrong  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize(
    ("sections", "kind", "quantization"),
    [
        ({}, "lora", None),
        ({"method": "qlora"}, "lora", "nf4"),
        ({"method": "full"}, None, None),
        ({"adapter": {"type": "dora"}, "quantization": "nf4"}, "dora", "nf4"),
        ({"method": "vera", "adapter": {"type": "vera"}}, "vera", None),
        ({"method": "qlora", "adapter": {"type": "lora"}}, "lora", "nf4"),
    ],
    ids=str,
)
def test_a_method_is_a_name_for_an_adapters_type_and_a_quantization(
    write: Write, sections: dict[str, Any], kind: str | None, quantization: str | None
) -> None:
    recipe = load_recipe(write(**sections))
    assert (recipe.adapter_type, recipe.base_quantization) == (kind, quantization)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        (
            {"method": "vera", "adapter": {"type": "dora"}},
            "means adapter.type vera, and adapter.type is dora",
        ),
        ({"method": "full", "adapter": {"type": "lora"}}, "adapter.type means nothing for method full"),
        ({"method": "full", "quantization": "nf4"}, "keeps weights frozen, and method full trains them all"),
        ({"adapter": {"type": "vera", "alpha": 3}}, "adapter.alpha means nothing for vera"),
        ({"formats": []}, "'formats' is []"),
        ({"formats": ["gptq", "gptq"]}, "formats names one twice"),
        ({"method": "full", "formats": ["adapter"]}, "formats names adapter, and method full trains none"),
    ],
    ids=str,
)
def test_two_keys_that_contradict_each_other_are_refused(write: Write, sections: dict[str, Any], told: str) -> None:
    assert told in refusal(write(**sections))
