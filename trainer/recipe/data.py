"""The `data` section of a recipe: the sources of the examples, and how they are selected."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from trainer.recipe.paths import Sources
from trainer.recipe.section import Section


class Learn(StrEnum):
    """Which answers of a training example are trained on if none of its turns specifies a weight."""

    LAST = "last"
    ALL = "all"


class Data(Section):
    """Sources of examples: files, folders, or Hub datasets (`hf:ORG/NAME`); see [data](data.md)."""

    train: Sources = ()
    """examples to train on; required unless `adapter.trained` or `adapter.combine` is set"""
    heldout: Sources | None = None
    """examples for evaluating the version, which are never used for training; default: a part of `data.train`"""
    heldout_share: float = Field(0.1, gt=0, lt=1)
    """share of `data.train` that is held out if `data.heldout` is not set"""
    validation: Sources | None = None
    """validation examples: their loss is measured during training and in sweeps, and decides which weights and
    values are selected. The held-out examples are then not used for selection, so a version's figures are
    unbiased; default: the held-out examples"""
    general: Sources | None = None
    """general examples that are mixed into the training examples to reduce forgetting"""
    general_share: float = Field(0.1, gt=0, lt=1)
    """share of general examples among the training examples"""
    learn: Learn = Learn.ALL
    """all or last: which answers of a training example are trained on; a `weight` on a turn overrides this,
    see [data](data.md#conversations)"""
    seed: int = Field(0, ge=0)
    """seed for selecting the held-out examples and the general examples"""
    skip: int = Field(0, ge=0)
    """number of training examples to skip at the start"""
    limit: Annotated[int, Field(ge=2)] | None = None
    """maximum number of training examples; default: all"""
