"""Presets that select which layers get an adapter. trainer.model.target_modules finds these layers in a
model.
"""

from enum import StrEnum


class Targets(StrEnum):
    """Preset that selects which layers get an adapter."""

    ATTENTION_MIN = "attention-min"
    """Query and value projections, as in the LoRA paper (Hu et al. 2021, section 4.2)."""
    ATTENTION = "attention"
    """Every attention projection: query, key, value and output."""
    ALL_LINEAR = "all-linear"
    """Attention and feed-forward layers, as in the QLoRA paper (Dettmers et al. 2023)."""
