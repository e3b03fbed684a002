"""The choice of layers that get an adapter: a preset or a list of names. trainer.model.target_modules finds these
layers in a model.
"""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema


class Targets(StrEnum):
    """Preset that selects which layers get an adapter."""

    ATTENTION_MIN = "attention-min"
    """Query and value projections, as in the LoRA paper (Hu et al. 2021, section 4.2)."""
    ATTENTION = "attention"
    """Every attention projection: query, key, value and output."""
    ALL_LINEAR = "all-linear"
    """Attention and feed-forward layers, as in the QLoRA paper (Dettmers et al. 2023)."""


def _as_targets(value: Any) -> Any:
    """Parse a string as the name of a preset. Other values are returned unchanged.

    Raises:
        ValueError: there is no such preset.
    """
    if isinstance(value, str) and value not in tuple(Targets):
        raise ValueError(f"expected one of {', '.join(Targets)}, or a list of layer names such as [q_proj, v_proj]")
    return value


TargetChoice = Annotated[
    Targets | Annotated[tuple[Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")], ...], Field(min_length=1)],
    BeforeValidator(_as_targets),
    WithJsonSchema({"anyOf": [{"enum": list(Targets)}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
"""A preset, or suffixes of layer names, such as `q_proj` or `mlp.up_proj`."""
