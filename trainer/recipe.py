"""The recipe: what to train, as YAML. Every key has a default but `name`, `base` and `data.train`.

Unknown keys and wrong types are errors, because a misspelt hyperparameter that is ignored costs a night of training.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from svc.dataset.source import HUB_PREFIX
from svc.errors import RecipeError
from svc.registry.version import NAME_PATTERN
from svc.yaml_text import parse_yaml


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _beside_recipe(path: Path | None, info: ValidationInfo) -> Path | None:
    """Paths in a recipe are relative to the recipe, so that it runs from any working folder."""
    folder = (info.context or {}).get("folder", Path())
    try:
        return None if path is None else (folder / path.expanduser()).absolute()
    except RuntimeError as error:
        raise ValueError(f"no user of this machine has the home folder of {path}") from error


def _as_sources(value: Any) -> Any:
    """One source is a list of one."""
    return [str(value)] if isinstance(value, str | Path) else value


def _sources_beside_recipe(sources: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    return tuple(
        source if source.startswith(HUB_PREFIX) else str(_beside_recipe(Path(source), info)) for source in sources
    )


_NAME = Annotated[str, Field(min_length=1)]
Sources = Annotated[
    tuple[_NAME, ...],
    BeforeValidator(_as_sources),
    AfterValidator(_sources_beside_recipe),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
"""Files, folders, or hub datasets as hf:ORG/NAME; one of them may stand alone."""


class Data(_Section):
    """Where the examples are: files, folders, or hub datasets as `hf:ORG/NAME`; see [data](data.md)."""

    train: Sources = Field(description="what to learn")
    heldout: Sources | None = Field(
        None, description="never trained on; the version is judged by it; default: a part of `data.train`"
    )
    heldout_share: float = Field(
        0.1, gt=0, lt=1, description="share of `data.train` that is held out, where `data.heldout` names nothing"
    )
    general: Sources | None = Field(None, description="general examples to mix in, against forgetting")
    general_share: float = Field(0.1, gt=0, lt=1, description="share of the training examples that are general ones")
    seed: int = Field(0, ge=0, description="decides what is held out, and which general examples are taken")
    skip: int = Field(0, ge=0, description="leave out the first so many training examples")
    limit: Annotated[int, Field(ge=2)] | None = Field(None, description="train on so many examples only; default all")


class Lora(_Section):
    """The adapter, on all linear layers."""

    rank: int = Field(16, ge=1, le=1024, description="width of the update: more learns more, and costs more memory")
    alpha: int = Field(32, ge=1, description="scale: alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the adapter's inputs left out in a step")


class Train(_Section):
    """The optimizer's run."""

    learning_rate: float = Field(5e-4, gt=0, description="largest step size; falls linearly to 0")
    epochs: float = Field(1.0, gt=0, description="passes over the examples")
    batch_size: int = Field(16, ge=1, description="examples a step")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the step size rises")
    max_length: int = Field(1024, ge=16, description="tokens; a longer example is an error, never cut")
    seed: int = Field(0, ge=0, description="decides the order of examples and the adapter's start")


class Quantize(_Section):
    """GPTQ. `group_size` must divide the model's layer widths; 64 fits most, 128 is customary for large models."""

    bits: Literal[4] = Field(4, description="the only width that the engine's CPU kernel takes")
    group_size: Literal[32, 64, 128] = Field(64, description="weights that share a scale")
    samples: int = Field(64, ge=8, le=1024, description="training examples that calibrate the rounding")


class Evaluate(_Section):
    """How base, merged and GPTQ are judged, on the engine."""

    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="first so many held-out examples; default all")
    max_tokens: int = Field(64, ge=1, description="longest answer, tokens")
    max_gptq_loss: float = Field(0.05, ge=0, le=1, description="exact match that quantizing may cost at most")


class Qualify(_Section):
    """The probes that prove, at every later load, that the engine runs these weights."""

    probes: int = Field(8, ge=1, le=8, description="how many")
    repeats: int = Field(20, ge=1, description="measurements of the engine's own noise, which is the tolerance's floor")
    restart: bool = Field(True, description="measure on a second engine too: in place and freshly loaded must agree")


class Recipe(_Section):
    """One model to train."""

    name: str = Field(pattern=NAME_PATTERN, description="the model's name for clients")
    base: str = Field(min_length=1, description="known id, hub id, NAME@N, local folder or GGUF file")
    data: Data
    lora: Lora = Lora()
    train: Train = Train()
    quantize: Quantize = Quantize()
    evaluate: Evaluate = Evaluate()
    qualify: Qualify = Qualify()

    @field_validator("base")
    @classmethod
    def _local_base(cls, base: str, info: ValidationInfo) -> str:
        """A base that is written as a path is one."""
        is_path = base.startswith((".", "/", "~")) or base.endswith(".gguf")
        return str(_beside_recipe(Path(base), info)) if is_path else base


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        overrides: `key=value` with a dotted key and a YAML value, as `train.epochs=2`.

    Raises:
        RecipeError: no such file, not YAML, an unknown key, a wrong type; names the key and its value.
    """
    try:
        content = parse_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot open recipe {path}: {error.strerror}", todo="check the path") from error
    except ValueError as error:
        raise RecipeError(f"{path} is not YAML: {error}", expected="a YAML mapping in UTF-8") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds {content!r:.80}", expected="a YAML mapping: name, base, data, ...")
    for override in overrides:
        _set(content, override)
    try:
        return Recipe.model_validate(content, context={"folder": path.absolute().parent})
    except ValidationError as error:
        raise _explain(path, error) from error


def _set(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise RecipeError(f"--set {override!r}", expected="key=value, as train.epochs=2")
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise RecipeError(f"--set {override!r}: {section} is no section", expected="key=value, as train.epochs=2")
    try:
        content[last] = parse_yaml(value)
    except ValueError as error:
        raise RecipeError(f"--set {override!r}: {value!r} is not a YAML value") from error


def _explain(path: Path, error: ValidationError) -> RecipeError:
    problems = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        match problem["type"]:
            case "extra_forbidden":
                problems.append(f"unknown key {key!r}{_suggest(key)}")
            case "missing":
                problems.append(f"{key!r} is missing")
            case _:
                problems.append(f"{key!r} is {problem['input']!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
    return RecipeError(
        f"{path}: {'; '.join(problems)}", todo="see docs/recipe.md for every key, its type and its default"
    )


def _suggest(key: str) -> str:
    import difflib

    close = difflib.get_close_matches(key, [*recipe_keys(), *Recipe.model_fields], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def recipe_keys() -> list[str]:
    """Every key of a recipe, dotted."""
    keys: list[str] = []
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{inner}" for inner in section.model_fields]
        else:
            keys.append(name)
    return keys
