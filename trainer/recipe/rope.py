"""The section `rope_scaling`: positions for texts longer than those that the base was trained on."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from trainer.recipe.section import Section


class RopeType(StrEnum):
    """How rotary position embeddings are scaled.

    Dynamic NTK scaling is left out: transformers scales a text that is longer than the base's context by its own
    length, but vLLM computes all rotations once, for the base's context only, so that the engine could not serve the
    model that was trained.
    """

    LINEAR = "linear"
    """All positions are divided by the factor (Chen et al. 2023)."""
    YARN = "yarn"
    """Slow rotations are divided by the factor, fast ones are kept (Peng et al. 2023)."""


class RopeScaling(Section):
    """Longer context: scaling of the rotary position embeddings in training, evaluation and serving; see
    [training](training.md#longer-context).
    """

    type: RopeType | None = None
    """linear or yarn; default: the base's own positions"""
    factor: Annotated[float, Field(gt=1, le=128)] | None = None
    """how many times longer the context becomes; required with `type`"""
    replace: bool = False
    """replace the base's own scaling, if it has one, instead of rejecting the base"""
