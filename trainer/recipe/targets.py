"""Presets of the layers that get an adapter. trainer.model.target_modules finds them in a model."""

from enum import StrEnum


class Targets(StrEnum):
    """Preset of layers that get an adapter."""

    ATTENTION_MIN = "attention-min"
    """Query and value projections, as in the paper on LoRA (Hu et al. 2021, section 4.2)."""
    ATTENTION = "attention"
    """Every projection of attention: query, key, value, output."""
    ALL_LINEAR = "all-linear"
    """Attention and feed-forward, as in the paper on QLoRA (Dettmers et al. 2023)."""
