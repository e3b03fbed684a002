"""Tests how a client's request becomes a recipe that `svc train` accepts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.fine_tuning.recipe import (
    RECIPE_KEYS,
    Sources,
    check_conflicts,
    check_recipe_keys,
    complete,
    default_epochs,
    make_recipe,
    recipe_text,
    registered_name,
    suffix_of,
    training_variables,
)
from serving.fine_tuning.request import JobRequest
from serving.fine_tuning.training_check import TrainingCheck
from serving.protocols.request import InvalidRequestError
from svc.version import NAME_PATTERN, Format
from trainer.recipe.file import load_recipe, recipe_keys
from trainer.recipe.recipe import Recipe

SOURCES = Sources("/models/small", Path("/home/files/file-1"), None)
CHECK = TrainingCheck(examples=200, learning_rate=5e-4, seconds=10.0)
OWNERS = st.one_of(st.just(""), st.text("0123456789abcdefghijklmnopqrstuvwxyz", min_size=8, max_size=8))


def request_of(**fields: Any) -> JobRequest:
    return JobRequest.model_validate_json(json.dumps({"model": "small", "training_file": "file-1", **fields}))


def hyperparameters(**others: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    auto = st.just("auto")
    return st.fixed_dictionaries(
        {},
        optional={
            "n_epochs": auto | st.integers(1, 50),
            "batch_size": auto | st.integers(1, 256),
            "learning_rate_multiplier": auto | st.floats(1e-6, 100),
            **{name: auto | values for name, values in others.items()},
        },
    )


METHODS = st.one_of(
    st.builds(lambda values: {"type": "supervised", "supervised": {"hyperparameters": values}}, hyperparameters()),
    st.builds(
        lambda values: {"type": "dpo", "dpo": {"hyperparameters": values}}, hyperparameters(beta=st.floats(1e-6, 2))
    ),
    st.sampled_from([{"type": "supervised"}, {"type": "dpo"}]),
)
VALID_KEYS: dict[str, st.SearchStrategy[Any]] = {
    "quantization": st.just("nf4"),
    "chat_template": st.sampled_from(["chatml", "alpaca", "llama-2", "zephyr"]),
    "formats": st.sampled_from([["adapter"], ["merged"], ["merged", "gptq"], ["adapter", "merged", "gptq"]]),
    "data": st.fixed_dictionaries({}, optional={"heldout_share": st.floats(0.01, 0.9)}),
    "adapter": st.fixed_dictionaries(
        {},
        optional={
            "rank": st.integers(1, 1024),
            "alpha": st.integers(1, 1000),
            "targets": st.sampled_from(["attention-min", "attention", "all-linear"]),
            "rslora": st.booleans(),
        },
    ),
    "train": st.fixed_dictionaries(
        {},
        optional={
            "schedule": st.sampled_from(["linear", "cosine", "constant"]),
            "warmup_ratio": st.floats(0, 0.9),
            "max_length": st.integers(16, 4096),
            "gradient_accumulation": st.integers(1, 8),
        },
    ),
    "quantize": st.fixed_dictionaries({}, optional={"group_size": st.sampled_from([32, 64, 128])}),
    "evaluate": st.fixed_dictionaries(
        {},
        optional={
            "metrics": st.lists(st.sampled_from(["rouge", "exact_match"]), min_size=1, max_size=2),
            "general": st.booleans(),
            "max_gptq_loss": st.floats(0, 1),
            "undecided": st.sampled_from(["warn", "fail"]),
        },
    ),
}
REQUESTS = st.fixed_dictionaries(
    {"method": METHODS},
    optional={
        "suffix": st.text("aZ09 -_.ß/:", min_size=1, max_size=63).map(lambda text: f"x{text}"),
        "seed": st.integers(0, 2**32 - 1),
        "validation_file": st.just("file-2"),
        "recipe": st.fixed_dictionaries({}, optional=VALID_KEYS),
    },
)


def loaded(folder: Path, recipe: dict[str, Any]) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(recipe_text(recipe), "utf-8")
    return load_recipe(path)


def test_recipe_of_a_job_has_no_quantized_format_unless_requested(tmp_path: Path) -> None:
    requests = request_of(), request_of(recipe={"formats": ["gptq"]})
    formats = [loaded(tmp_path, make_recipe(each, "tuned", SOURCES)).formats for each in requests]
    assert formats == [(Format.MERGED,), (Format.GPTQ,)]


@pytest.mark.slow
@given(fields=REQUESTS, owner=OWNERS, examples=st.integers(1, 10**6))
def test_recipe_generated_from_any_valid_job_request_is_accepted_by_the_trainer(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], owner: str, examples: int
) -> None:
    request = request_of(**fields)
    check_recipe_keys(request.recipe or {})
    check_conflicts(request)
    heldout = Path("/home/files/file-2") if request.validation_file else None
    name = registered_name(owner, request.suffix or request.model)
    made = make_recipe(request, name, Sources(SOURCES.base, SOURCES.train, heldout))
    folder = tmp_path_factory.mktemp("recipe")
    loaded(folder, made)  # which `svc estimate` reads
    completed, made, _ = complete(request, made, TrainingCheck(examples, 5e-4, 10.0))
    recipe = loaded(folder, made)
    values = completed.values
    assert recipe.train.epochs == values.n_epochs
    assert recipe.train.batch_size == values.batch_size
    assert recipe.train.seed == (request.seed or 0)
    assert recipe.data.train == ("/home/files/file-1",)
    assert recipe.data.heldout == (None if heldout is None else (str(heldout),))
    assert recipe.name == name
    assert request_of(**json.loads(completed.json_text())) == completed


def test_hyperparameters_of_a_request_become_recipe_keys(tmp_path: Path) -> None:
    values = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5, "beta": 0.3}
    request = request_of(method={"type": "dpo", "dpo": {"hyperparameters": values}}, seed=7)
    _, made, seconds = complete(request, make_recipe(request, "tuned", SOURCES), CHECK)
    recipe = loaded(tmp_path, made)
    assert (recipe.objective, recipe.preference.beta) == ("dpo", 0.3)
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.seed) == (2, 4, 7)
    assert recipe.train.learning_rate == 2.5e-4
    assert seconds == 20.0


def test_auto_hyperparameters_are_resolved_once_the_examples_are_counted(tmp_path: Path) -> None:
    request = request_of()
    completed, made, _ = complete(request, make_recipe(request, "tuned", SOURCES), CHECK)
    expected = {"n_epochs": 3, "batch_size": 16, "learning_rate_multiplier": 1.0}
    assert completed.values.model_dump() == expected
    assert loaded(tmp_path, made).train.learning_rate is None


def test_deprecated_hyperparameters_give_the_same_recipe_as_method_hyperparameters() -> None:
    values = {"n_epochs": 2, "batch_size": 4}
    old, new = (
        request_of(hyperparameters=values),
        request_of(method={"type": "supervised", "supervised": {"hyperparameters": values}}),
    )
    assert make_recipe(old, "tuned", SOURCES) == make_recipe(new, "tuned", SOURCES)


@pytest.mark.parametrize(
    ("examples", "epochs"), [(1, 25), (10, 10), (33, 3), (100, 3), (8333, 3), (10_000, 2), (25_000, 1), (10**6, 1)]
)
def test_default_number_of_epochs_follows_the_rule_published_by_openai(examples: int, epochs: int) -> None:
    assert default_epochs(examples) == epochs


def test_clients_cannot_set_recipe_keys_that_hold_paths_addresses_or_code() -> None:
    assert set(RECIPE_KEYS) <= set(recipe_keys())
    forbidden = {"name", "base", "objective", "report_to", "train.devices", "evaluate.json_schema"}
    sections = {"judge", "sweep", "qualify", "checkpoints"}
    assert not forbidden & set(RECIPE_KEYS)
    assert not {key for key in RECIPE_KEYS if key.partition(".")[0] in sections}
    assert {key for key in RECIPE_KEYS if key.startswith("data.")} == {"data.heldout_share", "data.learn"}


@pytest.mark.parametrize(
    ("recipe", "param"),
    [
        ({"data": {"train": "/etc/passwd"}}, "recipe.data.train"),
        ({"data": {"heldout": ["x"]}}, "recipe.data.heldout"),
        ({"judge": {"url": "http://169.254.169.254"}}, "recipe.judge"),
        ({"report_to": ["wandb"]}, "recipe.report_to"),
        ({"name": "tickets"}, "recipe.name"),
        ({"objective": "kto"}, "recipe.objective"),
        ({"train": {"devices": 8}}, "recipe.train.devices"),
        ({"train": {"epochs": 1000}}, "recipe.train.epochs"),
        ({"train": 5}, "recipe.train"),
        ({"adapter": {"rank": "8"}}, "recipe.adapter.rank"),
        ({"adapter": {"rank": True}}, "recipe.adapter.rank"),
        ({"adapter": {"rank": 1e9}}, "recipe.adapter.rank"),
        ({"adapter": {"rslora": 1}}, "recipe.adapter.rslora"),
        ({"chat_template": "./a.jinja"}, "recipe.chat_template"),
        ({"chat_template": "/tmp/a.jinja"}, "recipe.chat_template"),
        ({"evaluate": {"general": "questions"}}, "recipe.evaluate.general"),
        ({"evaluate": {"metrics": ["./a.py:score"]}}, "recipe.evaluate.metrics"),
        ({"evaluate": {"metrics": []}}, "recipe.evaluate.metrics"),
        ({"evaluate": {"primary": "a.py:score"}}, "recipe.evaluate.primary"),
        ({"evaluate": {"json_schema": "a.json"}}, "recipe.evaluate.json_schema"),
        ({"formats": "adapter"}, "recipe.formats"),
        ({"method": None}, "recipe.method"),
        ({"base": ["a"]}, "recipe.base"),
        ({"adapter.rank": 8, "x" * 1000: 1}, "recipe." + "x" * 93),
    ],
    ids=str,
)
def test_error_names_a_recipe_key_that_clients_may_not_set(recipe: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_recipe_keys(recipe)
    assert caught.value.param == param


def test_request_that_sets_a_hyperparameter_twice_is_rejected() -> None:
    both = request_of(method={"type": "supervised"}, hyperparameters={"n_epochs": 1})
    with pytest.raises(InvalidRequestError, match="'hyperparameters' cannot be combined with 'method'"):
        check_conflicts(both)
    rates = request_of(hyperparameters={"learning_rate_multiplier": 2}, recipe={"train": {"learning_rate": 1e-4}})
    with pytest.raises(InvalidRequestError, match="cannot be combined with 'learning_rate_multiplier'"):
        check_conflicts(rates)


@pytest.mark.slow
@given(first=OWNERS, second=OWNERS, suffixes=st.tuples(st.text(max_size=100), st.text(max_size=100)))
def test_registered_model_names_of_different_owners_never_collide(
    first: str, second: str, suffixes: tuple[str, str]
) -> None:
    names = [registered_name(owner, suffix or "x") for owner, suffix in zip((first, second), suffixes, strict=True)]
    assert first == second or names[0] != names[1]


@given(owner=OWNERS, suffix=st.text("abc09._-", min_size=1, max_size=51))
def test_suffix_can_be_recovered_from_a_registered_model_name(owner: str, suffix: str) -> None:
    name = registered_name(owner, suffix)
    assert len(name) > 60 or suffix_of(name, owner) == suffix


def test_registered_model_names_differ_even_if_long_suffixes_share_a_prefix() -> None:
    names = {registered_name("alice123", "x" * 60 + end) for end in "ab"}
    assert len(names) == 2


def test_equivalent_requests_serialize_to_identical_json() -> None:
    first = request_of(metadata={"b": "1", "a": "2"}, suffix=None, hyperparameters={"n_epochs": "auto"})
    second = request_of(hyperparameters={}, metadata={"a": "2", "b": "1"})
    assert first.json_text() == second.json_text()
    assert first.json_text() != request_of(metadata={"a": "2"}, hyperparameters={}).json_text()


@pytest.mark.parametrize(
    "fields",
    [
        {"unknown": 1},
        {"suffix": ""},
        {"suffix": "x" * 65},
        {"suffix": "ßß"},
        {"seed": -1},
        {"seed": "1"},
        {"seed": 2**32},
        {"metadata": {str(number): "" for number in range(17)}},
        {"metadata": {"k" * 65: ""}},
        {"metadata": {"k": "v" * 513}},
        {"metadata": {"k": 1}},
        {"hyperparameters": {"n_epochs": 0}},
        {"hyperparameters": {"n_epochs": 1.5}},
        {"hyperparameters": {"n_epochs": "3"}},
        {"hyperparameters": {"batch_size": 257}},
        {"hyperparameters": {"learning_rate_multiplier": 0}},
        {"hyperparameters": {"beta": 0.1}},
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 2.1}}}},
        {"method": {"type": "dpo", "supervised": {}}},
        {"method": {"type": "other"}},
        {"method": {}},
        {"integrations": [{"type": "wandb"}]},
        {"integrations": [{"type": "wandb", "wandb": {"project": "a"}}] * 2},
        {"integrations": [{"type": "wandb", "wandb": {"project": "a", "tags": ["a,b"]}}]},
    ],
    ids=str,
)
def test_invalid_job_request_is_rejected(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        request_of(**fields)


def test_weights_and_biases_settings_of_the_client_are_passed_to_the_training_run(tmp_path: Path) -> None:
    wandb = {"project": "tickets", "entity": "team", "tags": ["a", "b"]}
    request = request_of(integrations=[{"type": "wandb", "wandb": wandb}])
    assert loaded(tmp_path, make_recipe(request, "tuned", SOURCES)).report_to == ("mlflow", "wandb")
    assert training_variables(request) == {
        "WANDB_PROJECT": "tickets",
        "WANDB_ENTITY": "team",
        "WANDB_TAGS": "a,b",
    }
    assert training_variables(request_of()) == {}


def test_model_name_made_from_any_suffix_and_owner_is_valid_in_the_registry() -> None:
    for suffix in ("Tickets", "my/model", "gpt-4o-mini-2024-07-18", "a" * 64, "ü", ".-"):
        for owner in ("", "0a1b2c3d"):
            assert re.fullmatch(NAME_PATTERN, registered_name(owner, suffix))
