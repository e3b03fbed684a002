"""The `rope_scaling` section of a recipe: scaling of positions for texts longer than the base's training context."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from trainer.recipe.section import Section


class RopeType(StrEnum):
    """How rotary position embeddings are scaled.

    Dynamic NTK scaling is not supported: for a text longer than the base's context, transformers scales by the length
    of that text, whereas vLLM computes all rotations once, for the base's context only. The engine would therefore
    serve a different model from the one that was trained.
    """

    LINEAR = "linear"
    """All positions are divided by the factor (Chen et al. 2023)."""
    YARN = "yarn"
    """Low rotation frequencies are divided by the factor, and high ones are unchanged (Peng et al. 2023)."""


class RopeScaling(Section):
    """Longer context: scaling of the rotary position embeddings in training, evaluation and serving; see
    [training](training.md#longer-context).
    """

    type: RopeType | None = None
    """linear or yarn; default: the base's own positions"""
    factor: Annotated[float, Field(gt=1, le=128)] | None = None
    """how many times longer the context becomes; required with `type`"""
    replace: bool = False
    """replace the base's own scaling of positions, if it has one, instead of rejecting the base"""
