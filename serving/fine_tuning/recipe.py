"""Turns a client's request into the recipe that `svc train` runs.

A client can set values in a recipe, but never paths, addresses or code that the server would read or run. The keys
listed below accept only numbers, booleans or short words as values.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serving.fine_tuning.request import DpoHyperparameters, JobRequest
from serving.fine_tuning.training_check import TrainingCheck
from serving.protocols.request import InvalidRequestError
from svc.version import NAME_PATTERN

DEFAULT_BATCH_SIZE = 16
DEFAULT_BETA = 0.1
MAX_CHECKPOINTS = 3
"""Number of final epochs whose checkpoints a job keeps. OpenAI keeps the same number."""
BASE_KEY = "base"
"""Key in a request's `recipe` that names the base and overrides the request's `model`. Recipes for `svc train` do not
have this key."""
_PREFIX = "ft-"
_NO_OWNER = "local"
_MAX_NAME = 63
_MAX_NUMBER = 1e6
_WORD = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 20 and all(map(_is_word, value))


_Check = Callable[[Any], bool]
_EXPECTED: Mapping[_Check, str] = {
    _is_flag: "true or false",
    _is_number: f"a number of at most {_MAX_NUMBER:,.0f}",
    _is_word: "a word of lower-case letters, digits, _ and -",
    _are_words: "a list of words of lower-case letters, digits, _ and -",
}
RECIPE_KEYS: Mapping[str, _Check] = {
    "method": _is_word,
    "quantization": _is_word,
    "merge_dequantized": _is_flag,
    "chat_template": _is_word,
    "formats": _are_words,
    "data.heldout_share": _is_number,
    "data.learn": _is_word,
    "adapter.type": _is_word,
    "adapter.rank": _is_number,
    "adapter.alpha": _is_number,
    "adapter.dropout": _is_number,
    "adapter.targets": _is_word,
    "adapter.rslora": _is_flag,
    "train.optimizer": _is_word,
    "train.learning_rate": _is_number,
    "train.schedule": _is_word,
    "train.warmup_ratio": _is_number,
    "train.gradient_accumulation": _is_number,
    "train.weight_decay": _is_number,
    "train.max_grad_norm": _is_number,
    "train.max_length": _is_number,
    "train.too_long": _is_word,
    "train.packing": _is_flag,
    "train.gradient_checkpointing": _is_flag,
    "train.neftune_alpha": _is_number,
    "preference.loss": _is_word,
    "preference.label_smoothing": _is_number,
    "stopping.every_steps": _is_number,
    "stopping.patience": _is_number,
    "stopping.keep_best": _is_flag,
    "quantize.group_size": _is_number,
    "quantize.samples": _is_number,
    "quantize.sequential": _is_flag,
    "evaluate.limit": _is_number,
    "evaluate.max_tokens": _is_number,
    "evaluate.metrics": _are_words,
    "evaluate.primary": _is_word,
    "evaluate.max_gptq_loss": _is_number,
    "evaluate.max_gptq_nll": _is_number,
    "evaluate.general": _is_flag,
    "evaluate.general_limit": _is_number,
    "evaluate.max_forgetting": _is_number,
    "evaluate.undecided": _is_word,
}
"""Keys of a recipe that clients may set, each with a function that checks its value. `svc train` validates the values
further."""
_SECTIONS = frozenset(key.partition(".")[0] for key in RECIPE_KEYS if "." in key)


@dataclass(frozen=True, slots=True)
class Sources:
    """The base and the files that a recipe uses.

    Attributes:
        base: base model, as in a recipe.
        heldout: validation file, or None to hold out a part of the training file.
    """

    base: str
    train: Path
    heldout: Path | None


def check_recipe_keys(recipe: Mapping[str, Any]) -> None:
    """Check that a client may set all keys of its `recipe`.

    Raises:
        InvalidRequestError: a key is unknown or not permitted, or a value has the wrong type.
    """
    if not isinstance(recipe.get(BASE_KEY, ""), str):
        param = f"recipe.{BASE_KEY}"
        raise InvalidRequestError(f"'{param}' has an invalid value", param=param, expected="the name of a base")
    for key, value in _flat(recipe).items():
        param = f"recipe.{key}"[:100]
        check = RECIPE_KEYS.get(key)
        if check is None:
            raise InvalidRequestError(
                f"'{param}' cannot be set by a job",
                param=param,
                expected=f"one of {', '.join(RECIPE_KEYS)}, or `{BASE_KEY}`, whose value is the name of a base",
            )
        if not check(value):
            raise InvalidRequestError(f"'{param}' has an invalid value", param=param, expected=_EXPECTED[check])


def check_conflicts(request: JobRequest) -> None:
    """Check that a request does not set the hyperparameters or the learning rate twice, in different fields.

    Raises:
        InvalidRequestError: a value is set twice.
    """
    if request.method is not None and request.hyperparameters is not None:
        raise InvalidRequestError(
            "'hyperparameters' cannot be combined with 'method'",
            param="hyperparameters",
            expected="hyperparameters inside `method` only",
        )
    rate = (request.recipe or {}).get("train", {}).get("learning_rate")
    if rate is not None and request.values.learning_rate_multiplier is not None:
        raise InvalidRequestError(
            "'recipe.train.learning_rate' cannot be combined with 'learning_rate_multiplier'",
            param="recipe.train.learning_rate",
            expected="either `learning_rate_multiplier` or a learning rate in the recipe",
        )


def registered_name(owner: str, suffix: str) -> str:
    """Return the name under which an owner's models with a given suffix are registered.

    The name contains the owner's id, so two owners never share a name. For requests without a key, it contains `local`,
    which is never the id of a key, because these ids have 8 characters.

    Args:
        owner: id of a key; empty for requests without a key.
    """
    begin = f"{_PREFIX}{owner or _NO_OWNER}-"
    name = begin + re.sub(r"[^a-z0-9._-]+", "-", suffix.lower())
    if len(name) > _MAX_NAME:
        digest = hashlib.sha256(suffix.encode()).hexdigest()[:8]
        name = f"{name[: _MAX_NAME - len(digest) - 1]}-{digest}"
    assert re.fullmatch(NAME_PATTERN, name)  # noqa: S101 - true for every suffix
    return name


def suffix_of(name: str, owner: str) -> str:
    """Return the suffix in a name that `registered_name` created, or any other name unchanged."""
    return name.removeprefix(f"{_PREFIX}{owner or _NO_OWNER}-")


def make_recipe(request: JobRequest, name: str, sources: Sources) -> dict[str, Any]:
    """Return the recipe for a request, without the values that depend on the examples; see `complete`."""
    values = request.values
    # Without GPTQ, whose gate would fail a job for a format that its owner has not asked for.
    recipe: dict[str, Any] = {"name": name, "base": sources.base, "formats": ["merged"]}
    recipe |= {key: value for key, value in (request.recipe or {}).items() if key not in _SECTIONS | {BASE_KEY}}
    sections = {key: dict(value) for key, value in (request.recipe or {}).items() if key in _SECTIONS}
    data = sections.pop("data", {}) | {"train": str(sources.train)}
    if sources.heldout is not None:
        data["heldout"] = str(sources.heldout)
    train = sections.pop("train", {}) | {"batch_size": values.batch_size or DEFAULT_BATCH_SIZE}
    if request.seed is not None:
        train["seed"] = request.seed
    if isinstance(values, DpoHyperparameters):
        recipe["objective"] = "dpo"
        sections["preference"] = sections.get("preference", {}) | {"beta": values.beta or DEFAULT_BETA}
    if request.integrations:
        recipe["report_to"] = ["mlflow", "wandb"]
    return recipe | {"data": data, "train": train, "checkpoints": {"keep_epochs": MAX_CHECKPOINTS}} | sections


def complete(
    request: JobRequest, recipe: Mapping[str, Any], check: TrainingCheck
) -> tuple[JobRequest, dict[str, Any], float]:
    """Replace each hyperparameter that is `auto` with a value. Return the request, its recipe and the expected duration
    of the training, in seconds.

    Args:
        check: result of checking `recipe`, whose number of epochs is still the default of 1.
    """
    values, train = request.values, dict(recipe["train"])
    epochs = values.n_epochs or default_epochs(check.examples)
    multiplier = values.learning_rate_multiplier
    if multiplier is not None:
        train["learning_rate"] = float(f"{multiplier * check.learning_rate:.3g}")
    elif "learning_rate" not in train:
        multiplier = 1.0
    train["epochs"] = epochs
    chosen = {"n_epochs": epochs, "batch_size": train["batch_size"], "learning_rate_multiplier": multiplier}
    if isinstance(values, DpoHyperparameters):
        chosen["beta"] = recipe["preference"]["beta"]
    completed = request.with_values(values.model_copy(update=chosen))
    return completed, {**recipe, "train": train}, check.seconds * epochs


def default_epochs(examples: int) -> int:
    """Return the number of epochs for `auto`: usually 3, but more for small datasets and fewer for large datasets.

    OpenAI chooses its own default by this rule, according to the OpenAI Cookbook's notebook on preparing chat data.
    """
    if 3 * examples < 100:
        return min(25, 100 // max(1, examples))
    return max(1, min(3, 25_000 // examples))


def file_keys(training_file: str, validation_file: str | None) -> dict[str, str]:
    """Return the ids of a job's files, keyed by the recipe keys (in the `data` section) that hold the files' paths."""
    return {"train": training_file} | ({"heldout": validation_file} if validation_file is not None else {})


def recipe_with_data(recipe: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """Return a job's recipe with the paths of its files on this machine. The paths differ between machines if
    tuneserve's home folder does.

    Args:
        paths: paths of the files, keyed by their recipe keys in the `data` section.
    """
    return {**recipe, "data": {**recipe["data"], **paths}}


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)


def training_variables(request: JobRequest) -> dict[str, str]:
    """Return the environment variables that set a job's project, entity and tags for Weights & Biases."""
    if not request.integrations:
        return {}
    wandb = request.integrations[0].wandb
    given = {"WANDB_PROJECT": wandb.project, "WANDB_ENTITY": wandb.entity, "WANDB_TAGS": ",".join(wandb.tags or ())}
    return {name: value for name, value in given.items() if value}


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `recipe`, keyed by dotted key, without the name of the base."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict) and key in _SECTIONS:
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif key != BASE_KEY:
            flat[key] = value
    return flat
