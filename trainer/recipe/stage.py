"""The stages of a run, and the selection of the stages that a recipe needs."""

from collections.abc import Mapping
from enum import StrEnum

from svc.version import QUANTIZED_FORMATS, SERVED_FORMATS, Format
from trainer.recipe.recipe import Recipe


class Stage(StrEnum):
    """A stage of a run. The members are listed in order of execution."""

    TRAIN = "train"
    MERGE = "merge"
    EVALUATE = "evaluate"
    QUANTIZE = "quantize"
    QUALIFY = "qualify"
    QUANTIZE_AWQ = "quantize-awq"
    QUALIFY_AWQ = "qualify-awq"
    QUANTIZE_INT8 = "quantize-int8"
    QUALIFY_INT8 = "qualify-int8"
    QUANTIZE_FP8 = "quantize-fp8"
    QUALIFY_FP8 = "qualify-fp8"
    EXPORT_GGUF = "export-gguf"
    PARITY = "parity"
    JUDGE = "judge"
    REGISTER = "register"


QUANTIZE_STAGES: Mapping[Format, Stage] = {
    Format.GPTQ: Stage.QUANTIZE,
    Format.AWQ: Stage.QUANTIZE_AWQ,
    Format.INT8: Stage.QUANTIZE_INT8,
    Format.FP8: Stage.QUANTIZE_FP8,
}
"""For each quantized format, the stage that writes it. Every format has its own stages, so that adding a format does
not repeat the stages of other formats."""
QUALIFY_STAGES: Mapping[Format, Stage] = {
    Format.GPTQ: Stage.QUALIFY,
    Format.AWQ: Stage.QUALIFY_AWQ,
    Format.INT8: Stage.QUALIFY_INT8,
    Format.FP8: Stage.QUALIFY_FP8,
}
"""For each quantized format, the stage that evaluates it on the engine."""
WRITE_STAGES: Mapping[Format, Stage] = {
    Format.MERGED: Stage.MERGE,
    **QUANTIZE_STAGES,
    Format.GGUF: Stage.EXPORT_GGUF,
}
"""For each format except the adapter, the stage that writes it."""


def choose_stages(recipe: Recipe) -> tuple[Stage, ...]:
    """Return the stages that the recipe's formats need, in order of execution."""
    formats = set(recipe.formats)
    merged, served = Format.MERGED in formats, not formats.isdisjoint(SERVED_FORMATS)
    needed = {Stage.TRAIN: True, Stage.MERGE: served, Stage.EVALUATE: merged}
    for format in QUANTIZED_FORMATS:
        needed |= dict.fromkeys((QUANTIZE_STAGES[format], QUALIFY_STAGES[format]), format in formats)
    needed |= {
        Stage.EXPORT_GGUF: Format.GGUF in formats,
        Stage.PARITY: served,
        Stage.JUDGE: merged and recipe.judge.url is not None,
        Stage.REGISTER: True,
    }
    return tuple(stage for stage, is_needed in needed.items() if is_needed)
