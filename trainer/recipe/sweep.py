"""The `sweep` section of a recipe: the search space of `svc sweep`."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from svc.settings.dotted_keys import suggest
from trainer.recipe.adapter import Adapter
from trainer.recipe.section import Section
from trainer.recipe.train import DEVICE_KEYS, Train


class Between(Section):
    """A range of values in a search space. It contains only integers if both ends are integers."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _is_range(self) -> "Between":
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("in a range, low must be less than high; if log is set, low must also be greater than 0")
        return self


class Sweep(Section):
    """Search space and final evaluation of `svc sweep`; see [sweep](sweep.md)."""

    space: (
        Annotated[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)] | Between], Field(min_length=1)] | None
    ) = None
    """keys of `train` and `adapter` to search, each with a list of values or `{low: , high: , log: true}`;
    default: a search in three phases"""
    trials: int = Field(20, ge=1)
    """maximum number of trials in `sweep.space`; if the space consists of lists with fewer combinations, all of
    them are tried"""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """total training time of the finished trials, in seconds, after which no new trial is started; default: no limit"""
    finalists: int = Field(3, ge=0)
    """number of trials with the lowest held-out loss to evaluate on the engine, in addition to the unchanged recipe;
    further trials are evaluated as long as all evaluated trials exceed `evaluate.max_forgetting`. The primary metric
    decides among the trials within that limit; with 0, held-out loss alone decides"""

    @field_validator("space")
    @classmethod
    def _has_keys(cls, space: dict[str, Any] | None) -> dict[str, Any] | None:
        # Trials train on one device.
        known = [f"train.{key}" for key in Train.model_fields if key not in DEVICE_KEYS]
        known += [f"adapter.{key}" for key in Adapter.model_fields]
        for key in space or ():
            if key not in known:
                raise ValueError(f"unknown key {key!r}{suggest(key, known)}; expected train.KEY or adapter.KEY")
        return space
