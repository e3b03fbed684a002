"""Tests recipe files: errors name the key and its value before anything is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from svc.dataset.schema.objective import Objective
from svc.errors import RecipeError
from tests.svc.json_values import json_values, mappings_of
from trainer.recipe.file import load_recipe, recipe_keys
from trainer.recipe.named_template import NamedTemplate
from trainer.recipe.recipe import Recipe

GOOD: dict[str, Any] = {"name": "tiny", "base": "org/model", "data": {"train": "t.jsonl", "heldout": "h.jsonl"}}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes the smallest valid recipe with the given changes."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(GOOD | changes), "utf-8")
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_recipe_with_only_the_required_keys_gets_default_values(write: Write) -> None:
    recipe = load_recipe(write())
    assert (recipe.name, recipe.base) == ("tiny", "org/model")
    assert recipe.train == Recipe.model_fields["train"].default


def test_recipe_values_replace_defaults(write: Write) -> None:
    recipe = load_recipe(write(train={"epochs": 2.5}, adapter={"rank": 4}, evaluate={"limit": 10}))
    assert (recipe.train.epochs, recipe.adapter.rank, recipe.evaluate.limit) == (2.5, 4, 10)
    assert recipe.alpha == 8


def test_recipe_paths_are_relative_to_the_recipe_file(
    write: Write, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(base="./base")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    recipe = load_recipe(path)
    assert recipe.data.train == (str(tmp_path / "t.jsonl"),)
    assert recipe.base == str(tmp_path / "base")


def test_chat_template_is_a_known_name_or_a_file_next_to_the_recipe(write: Write, tmp_path: Path) -> None:
    assert load_recipe(write(chat_template="llama-2")).chat_template is NamedTemplate.LLAMA_2
    own = load_recipe(write(chat_template="./own.jinja"))
    assert own.chat_template == tmp_path / "own.jinja"
    assert Recipe.model_validate(own.model_dump(mode="json")) == own


def test_hub_datasets_in_a_source_list_are_not_resolved_as_paths(write: Write, tmp_path: Path) -> None:
    data = load_recipe(write(data={"train": ["a.csv", "hf:org/name", "folder"]})).data
    assert data.train == (str(tmp_path / "a.csv"), "hf:org/name", str(tmp_path / "folder"))
    assert (data.heldout, data.general) == (None, None)


def test_absolute_and_home_folder_paths_are_unchanged(write: Write) -> None:
    recipe = load_recipe(write(base="~/model.gguf", data={"train": "/data/t.jsonl", "heldout": "~/h.jsonl"}))
    assert recipe.base == str(Path.home() / "model.gguf")
    assert recipe.data.train == ("/data/t.jsonl",)
    assert recipe.data.heldout == (str(Path.home() / "h.jsonl"),)


@pytest.mark.parametrize("base", ["smollm2-135m-instruct", "org/model", "tiny@3"])
def test_base_that_is_not_a_path_is_not_resolved_against_the_recipe_folder(write: Write, base: str) -> None:
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
        ({"chat_template": "chatlm"}, "expected one of chatml, alpaca, llama-2, zephyr, text; or a "),
        ({"chat_template": 3}, "'chat_template' is 3"),
    ],
    ids=str,
)
def test_error_for_an_invalid_recipe_names_the_key_and_its_value(
    write: Write, changes: dict[str, Any], text: str
) -> None:
    message = refusal(write(**changes))
    assert text in message
    assert "see docs/recipe.md" in message


def test_recipe_error_lists_all_invalid_keys(write: Write) -> None:
    message = refusal(write(trian={}, adapter={"rank": 0}))
    assert "'trian'" in message
    assert "'adapter.rank'" in message


def test_neftune_with_packing_is_rejected(write: Write) -> None:
    with pytest.raises(RecipeError, match="neftune_alpha cannot be used with"):
        load_recipe(write(train={"packing": True, "neftune_alpha": 5}))


def test_error_for_a_missing_recipe_names_the_file(tmp_path: Path) -> None:
    assert f"cannot open recipe {tmp_path / 'none.yaml'}: No such file" in refusal(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "got None"),
        (b"- a", "got ['a']"),
        (b"just text", "got 'just text'"),
        (b"name: [", "is not valid YAML"),
        (b"name: caf\xe9", "is not valid YAML"),
        (b"name: 2024-13-45", "is not valid YAML"),
        (b"name: !!python/object:os.system x", "is not valid YAML"),
    ],
)
def test_recipe_must_be_a_yaml_mapping(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert text in refusal(path)


def test_recipe_key_is_overridden_by_the_set_option(write: Write) -> None:
    recipe = load_recipe(write(train={"epochs": 9, "seed": 5}), ("train.epochs=2", "name=other", "adapter.rank=8"))
    assert (recipe.train.epochs, recipe.train.seed, recipe.name, recipe.adapter.rank) == (2, 5, "other", 8)


def test_last_override_takes_precedence_when_a_key_is_set_twice(write: Write) -> None:
    assert load_recipe(write(), ("train.epochs=2", "train.epochs=3")).train.epochs == 3


def test_recipe_override_value_is_parsed_as_yaml(write: Write) -> None:
    recipe = load_recipe(write(), ("evaluate.limit=null", "qualify.restart=no", "train.learning_rate=2.0e-4"))
    assert (recipe.evaluate.limit, recipe.qualify.restart, recipe.train.learning_rate) == (None, False, 2e-4)


def test_recipe_override_accepts_a_learning_rate_without_a_decimal_point(write: Write) -> None:
    assert load_recipe(write(), ("train.learning_rate=2e-4",)).train.learning_rate == 2e-4


def test_path_given_with_the_set_option_is_relative_to_the_recipe(write: Write, tmp_path: Path) -> None:
    assert load_recipe(write(), ("data.train=other.jsonl",)).data.train == (str(tmp_path / "other.jsonl"),)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.epochs", "--set 'train.epochs'"),
        ("=2", "--set '=2'"),
        ("train..epochs=2", "--set 'train..epochs=2'"),
        ("name.x=2", "name is not a section"),
        ("train.epochs=[", "'[' is not a valid YAML value"),
        ("train.epochs=2024-13-45", "'2024-13-45' is not a valid YAML value"),
        ("train.epochs=two", "'train.epochs' is 'two'"),
        ("train.epoch=2", "unknown key 'train.epoch' (did you mean 'train.epochs'?)"),
        ("train=5", "'train' is 5"),
    ],
)
def test_invalid_recipe_override_is_named_in_the_error(write: Write, override: str, text: str) -> None:
    assert text in refusal(write(), override)


def test_recipe_keys_are_the_leaves_of_the_schema() -> None:
    dumped = Recipe.model_validate(GOOD).model_dump()
    leaves = {
        f"{key}.{inner}" if inner else key
        for key, value in dumped.items()
        for inner in (value if isinstance(value, dict) else [""])
    }
    assert set(recipe_keys()) == leaves


@pytest.mark.slow
@given(mappings_of(recipe_keys()))
def test_any_mapping_is_loaded_as_a_recipe_or_rejected_with_a_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(GOOD | content), "utf-8")
    try:
        recipe = load_recipe(path)
    except RecipeError:
        return
    assert all(source.startswith(("/", "hf:")) for source in recipe.data.train)


@pytest.mark.slow
@given(st.sampled_from(recipe_keys()), json_values)
def test_error_for_a_rejected_value_names_the_recipe_key(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    section, _, inner = key.rpartition(".")
    change = {inner: value} if not section else {section: GOOD.get(section, {}) | {inner: value}}
    path = tmp_path_factory.getbasetemp() / "value.yaml"
    path.write_text(yaml.safe_dump(GOOD | change), "utf-8")
    try:
        load_recipe(path)
    except RecipeError as error:
        assert key in error.wrong  # noqa: PT017 - both outcomes are valid


@pytest.mark.slow
@given(st.text(max_size=30) | st.from_regex(r"[a-z.]{1,12}=.{0,12}"))
def test_any_value_passed_with_the_set_option_is_applied_or_rejected_with_a_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, override: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "set.yaml"
    path.write_text(yaml.safe_dump(GOOD), "utf-8")
    try:
        load_recipe(path, (override,))
    except RecipeError as error:
        assert error.wrong  # noqa: PT017 - both outcomes are valid


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
def test_method_implies_adapter_type_and_quantization(
    write: Write, sections: dict[str, Any], kind: str | None, quantization: str | None
) -> None:
    recipe = load_recipe(write(**sections))
    assert (recipe.adapter_type, recipe.base_quantization) == (kind, quantization)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"method": "vera", "adapter": {"type": "dora"}},
            "implies adapter.type vera, but adapter.type is dora",
        ),
        ({"method": "full", "adapter": {"type": "lora"}}, "adapter.type is not used by `method: full`"),
        ({"method": "full", "quantization": "nf4"}, "freezes the weights, but `method: full` trains them all"),
        ({"merge_dequantized": True}, "`merge_dequantized` requires `method: qlora` or `quantization: nf4`"),
        ({"adapter": {"type": "vera", "alpha": 3}}, "adapter.alpha is not used by vera"),
        ({"method": "full", "train": {"lora_plus_ratio": 4}}, "lora_plus_ratio is not used by `method: full`"),
        ({"method": "vera", "train": {"lora_plus_ratio": 4}}, "train.lora_plus_ratio is not used by vera"),
        ({"rope_scaling": {"factor": 4}}, "`rope_scaling` needs both a type and a factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "'rope_scaling.type' is 'dynamic'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4}, "formats": ["merged", "gguf"]},
            "`gguf`, which cannot be written with `rope_scaling`",
        ),
        ({"new_tokens": ["<a>", "<a>"]}, "`new_tokens` lists a token twice"),
        ({"new_tokens": ["<a>"], "formats": ["merged", "adapter"]}, "vLLM cannot load the embeddings of `new_tokens`"),
        ({"new_tokens": ["<a>"], "method": "adalora"}, "new_tokens cannot be trained with adalora"),
        (
            {"adapter": {"modules_to_save": ["lm_head"]}, "formats": ["adapter"]},
            "vLLM cannot load the layers in adapter.modules_to_save",
        ),
        ({"method": "vera", "adapter": {"modules_to_save": ["lm_head"]}}, "modules_to_save is not used by vera"),
        ({"new_tokens": ["a b"]}, "'new_tokens.0' is 'a b'"),
        ({"adapter": {"init": "zeros"}}, "'adapter.init' is 'zeros'"),
        ({"method": "dora", "adapter": {"init": "pissa"}}, "adapter.init is not used by dora"),
        ({"method": "qlora", "adapter": {"init": "pissa"}}, "`quantization: nf4` stores them in 4 bits"),
        ({"adapter": {"init": "olora", "rslora": True}}, "adapter.rslora cannot be used with `adapter.init: olora`"),
        ({"adapter": {"init": "pissa", "trained": "./other"}}, "has no effect if adapter.trained is set"),
        ({"formats": []}, "'formats' is []"),
        ({"formats": ["gptq", "gptq"]}, "`formats` lists a format twice"),
        ({"formats": ["gguf"]}, "`formats` lists `gguf` without `merged`"),
        ({"method": "vera", "train": {"sharding": "always"}}, "vera cannot be sharded across devices"),
        (
            {"train": {"sharding": "always", "optimizer": "adamw-8bit"}},
            "the moments of adamw-8bit cannot be sharded across devices",
        ),
        ({"method": "full", "formats": ["adapter"]}, "`formats` lists `adapter`, but `method: full` trains no adapter"),
    ],
    ids=str,
)
def test_contradictory_recipe_keys_are_rejected(write: Write, sections: dict[str, Any], message: str) -> None:
    assert message in refusal(write(**sections))


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"train": {"packing": True}}, "train.packing cannot be used"),
        ({"train": {"neftune_alpha": 5}}, "train.neftune_alpha cannot be used"),
        ({"train": {"too_long": "truncate"}}, "the preference does not apply to a truncated answer"),
        ({"adapter": {"dropout": 0.1}}, "adapter.dropout cannot be used"),
        ({"data": GOOD["data"] | {"general": "g.jsonl"}}, "data.general cannot be used"),
        ({"data": GOOD["data"] | {"learn": "last"}}, "data.learn cannot be used"),
        ({"preference": {"desirable_weight": 2}}, "preference.desirable_weight is not used by `objective: dpo`"),
        ({"preference": {"loss": "robust"}}, "preference.label_smoothing must be set together"),
        ({"preference": {"label_smoothing": 0.1}}, "preference.label_smoothing must be set together"),
        ({"objective": "sft", "preference": {"beta": 1}}, "preference.beta is not used by `objective: sft`"),
        ({"objective": "orpo", "preference": {"loss": "ipo"}}, "preference.loss is not used by `objective: orpo`"),
    ],
)
def test_recipe_is_rejected_when_its_objective_does_not_support_a_key(
    sections: dict[str, Any], reason: str, write: Write
) -> None:
    assert reason in refusal(write(**{"objective": "dpo"} | sections))


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"chat_template": "chatml"}, "chat_template"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
        ({"data": GOOD["data"] | {"learn": "last"}}, "data.learn"),
        ({"train": {"too_long": "truncate"}}, "train.too_long"),
        ({"evaluate": {"metrics": ["rouge"]}}, "evaluate.metrics"),
        ({"evaluate": {"primary": "chrf"}}, "evaluate.primary"),
        ({"evaluate": {"json_schema": "s.json"}}, "evaluate.json_schema"),
        ({"evaluate": {"max_tokens": 8}}, "evaluate.max_tokens"),
        ({"evaluate": {"general": True}}, "evaluate.general"),
        ({"judge": {"url": "http://judge", "model": "m"}}, "judge.url"),
        ({"preference": {"beta": 1}}, "preference.beta"),
    ],
    ids=str,
)
def test_raw_text_recipe_is_rejected_when_a_key_requires_conversations(
    sections: dict[str, Any], key: str, write: Write
) -> None:
    assert key in refusal(write(**{"objective": "text"} | sections))


def test_raw_text_recipe_disables_general_questions(write: Write) -> None:
    recipe = load_recipe(write(objective="text", evaluate={"limit": 5}))
    assert (recipe.chat_template, recipe.evaluate.general, recipe.evaluate.limit) == (NamedTemplate.TEXT, False, 5)
    assert recipe.changed({"train.seed": 3}).objective is Objective.TEXT


def test_run_parameters_include_only_preference_keys_used_by_the_objective(write: Write) -> None:
    keys = {
        objective: {key for key in load_recipe(write(objective=objective)).flat() if key.startswith("preference.")}
        for objective in ("sft", "orpo")
    }
    assert keys == {"sft": set(), "orpo": {"preference.beta"}}
