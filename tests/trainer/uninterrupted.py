"""Provides uninterrupted runs, each trained once, for comparison with interrupted runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType
from trainer.recipe.recipe import Recipe
from trainer.training.summary import TrainingData, TrainingSummary


@dataclass(frozen=True)
class Run:
    """Summary of a run, with the folder of its weights and checkpoints. Tests must not change the folder."""

    summary: TrainingSummary
    folder: Path


class UninterruptedRuns:
    """Trains each recipe once, when it is first used."""

    def __init__(self, base: Path, examples: Sequence[ChatExample], folder: Path) -> None:
        self._base, self._data, self._folder = base, TrainingData(examples, examples[:5]), folder
        self._runs: dict[tuple[str, NumberType], Run] = {}

    def run(self, recipe: Recipe, number_type: NumberType = NumberType.BFLOAT16) -> Run:
        """Return a recipe's run with the given data type."""
        from trainer.training.sft import train_model

        key = recipe.model_dump_json(), number_type
        if key not in self._runs:
            folder = self._folder / str(len(self._runs))
            out, checkpoints = folder / "trained", folder / "checkpoints"
            summary = train_model(self._base, self._data, recipe, out, checkpoints, number_type=number_type)
            self._runs[key] = Run(summary, folder)
        return self._runs[key]
