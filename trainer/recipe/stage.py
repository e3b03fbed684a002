"""The stages of a run, and which of them a recipe needs."""

from enum import StrEnum

from svc.version import Format
from trainer.recipe.recipe import Recipe


class Stage(StrEnum):
    """A stage of a run. The members are listed in order of execution."""

    TRAIN = "train"
    MERGE = "merge"
    EVALUATE = "evaluate"
    QUANTIZE = "quantize"
    QUALIFY = "qualify"
    PARITY = "parity"
    JUDGE = "judge"
    REGISTER = "register"


def choose_stages(recipe: Recipe) -> tuple[Stage, ...]:
    """Return the stages that the recipe's formats need, in order of execution."""
    formats = set(recipe.formats)
    merged, gptq = Format.MERGED in formats, Format.GPTQ in formats
    needed = {
        Stage.TRAIN: True,
        Stage.MERGE: merged or gptq,
        Stage.EVALUATE: merged,
        Stage.QUANTIZE: gptq,
        Stage.QUALIFY: gptq,
        Stage.PARITY: merged or gptq,
        Stage.JUDGE: merged and recipe.judge.url is not None,
        Stage.REGISTER: True,
    }
    return tuple(stage for stage, is_needed in needed.items() if is_needed)
