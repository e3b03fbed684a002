"""The request that creates a fine-tuning job, in the format that OpenAI's client sends.

Unknown fields are rejected. `recipe` is the only field that is not in OpenAI's API; clients send it through
`extra_body`.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

AUTO = "auto"
_NO_NUL = r"^[^\x00]*$"  # these are environment variables of the training
_OTHER_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]+")


def _number_or_auto(value: Any) -> Any:
    return None if value == AUTO else value


def _clean_suffix(suffix: str) -> str:
    """Replace characters that are not allowed in model names with hyphens."""
    cleaned = _OTHER_CHARACTERS.sub("-", suffix).strip("-._")
    if not cleaned:
        raise ValueError("a suffix must contain at least one ASCII letter or digit")
    return cleaned


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Epochs = Annotated[int, Field(ge=1, le=50)]
BatchSize = Annotated[int, Field(ge=1, le=256)]
Multiplier = Annotated[float, Field(gt=0, le=100)]
Beta = Annotated[float, Field(gt=0, le=2)]


class Hyperparameters(_Object):
    """Hyperparameters of supervised fine-tuning. None means `auto`."""

    n_epochs: Annotated[Epochs | None, BeforeValidator(_number_or_auto)] = None
    batch_size: Annotated[BatchSize | None, BeforeValidator(_number_or_auto)] = None
    learning_rate_multiplier: Annotated[Multiplier | None, BeforeValidator(_number_or_auto)] = None


class DpoHyperparameters(Hyperparameters):
    """Hyperparameters of preference tuning."""

    beta: Annotated[Beta | None, BeforeValidator(_number_or_auto)] = None


class Supervised(_Object):
    """Settings of the `supervised` method."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(_Object):
    """Settings of the `dpo` method."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Method(_Object):
    """The training method and its hyperparameters."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_no_other_settings(self) -> "Method":
        for other in ("supervised", "dpo", "reinforcement"):
            if other != self.type and getattr(self, other) is not None:
                raise ValueError(f"method {self.type!r} does not use {other!r}")
        return self


class Wandb(_Object):
    """The Weights & Biases project that a job reports to."""

    project: str = Field(min_length=1, max_length=128, pattern=_NO_NUL)
    entity: str | None = Field(None, max_length=128, pattern=_NO_NUL)
    name: str | None = Field(None, max_length=128, pattern=_NO_NUL)
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^,\x00]*$")], ...] | None = Field(
        None, max_length=20
    )


class Integration(_Object):
    """A service to which a job reports its metrics."""

    type: Literal["wandb"]
    wandb: Wandb


class JobRequest(_Object):
    """Request body for creating a fine-tuning job.

    `hyperparameters` is deprecated, and `recipe` contains recipe keys; see docs/fine-tuning-api.md.
    """

    model: str = Field(min_length=1, max_length=256)
    training_file: str = Field(min_length=1, max_length=100)
    validation_file: str | None = Field(None, min_length=1, max_length=100)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_clean_suffix)] | None = None
    seed: int | None = Field(None, ge=0, lt=2**32)
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    integrations: Annotated[tuple[Integration, ...], Field(max_length=1)] | None = None
    recipe: dict[str, Any] | None = None

    @property
    def objective(self) -> Literal["supervised", "dpo", "reinforcement"]:
        """Name of the training method."""
        return self.method.type if self.method else "supervised"

    @property
    def values(self) -> Hyperparameters:
        """Hyperparameters of the training method."""
        if self.method is None:
            return self.hyperparameters or Hyperparameters()
        if self.method.type == "dpo":
            return (self.method.dpo or Dpo()).hyperparameters
        return (self.method.supervised or Supervised()).hyperparameters

    def with_values(self, values: Hyperparameters) -> "JobRequest":
        """Return a copy of the request with the given hyperparameters in `method` and without `hyperparameters`."""
        if isinstance(values, DpoHyperparameters):
            method = Method(type="dpo", dpo=Dpo(hyperparameters=values))
        else:
            method = Method(type="supervised", supervised=Supervised(hyperparameters=values))
        return self.model_copy(update={"method": method, "hyperparameters": None})

    def json_text(self) -> str:
        """Return the request as JSON. Equal requests produce identical JSON."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), sort_keys=True)
