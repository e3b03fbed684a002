"""Provides stand-ins for the stages that need a real model, and the examples of a recipe."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svc.engine.device import NumberType
from svc.errors import RecipeError, TrainingError
from svc.registry.parity import ParityReport
from svc.training_progress import ProgressFile
from svc.version import Format
from tests.svc.registry.model_folder import GPTQ, write_model
from tests.svc.registry.parity import make_parity
from tests.trainer.conftest import make_example
from trainer.evaluation.parity.report import Made
from trainer.export.eight_bits import RoundingSummary
from trainer.export.gguf.writer import GgufSummary
from trainer.export.gptq import QuantizeSummary
from trainer.export.verify_merge import MergeSummary
from trainer.pipeline.stages import Pipeline
from trainer.recipe.adapter import Method
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import QUANTIZE_STAGES, Stage
from trainer.training.parallel.processes import TrainingProcesses
from trainer.training.summary import TrainingSummary
from trainer.training_curve import TrainingPoint

TRAIN = tuple(make_example(f"q {number}", "yes") for number in range(3))
WORSE_QUANTIZED = tuple(make_example(f"ask {place}", "merged.0 merged.1 merged.2 merged.3") for place in range(7))
"""Examples that the double answers correctly only with the merged weights. There are enough of them to
prove a loss of answers, and too few to prove a loss of likelihood."""


CURVE = tuple(TrainingPoint(step=step, epoch=step / 3, loss=1 / step) for step in (1, 2, 3))
"""Loss curve of a simulated training."""


Make = Callable[..., Pipeline]


@dataclass
class Stages:
    """Stand-ins for the stages that need a real model. Each writes small files and records that it ran.

    Attributes:
        ran: stages that ran, in order.
        broken: stages that are interrupted halfway.
        number_types: data types with which stages were called.
        recipes: recipes with which models were trained.
        devices: number of devices of each training, or 0 for this process alone.
        sharded: whether each run's weights are sharded across its devices.
        compared: formats compared in each parity report.
        unequal: parity checks that fail.
        refused_gguf: whether the base cannot be written to GGUF.
    """

    ran: list[Stage] = field(default_factory=list)
    broken: set[Stage] = field(default_factory=set)
    number_types: list[NumberType] = field(default_factory=list)
    recipes: list[Recipe] = field(default_factory=list)
    devices: list[int] = field(default_factory=list)
    sharded: list[bool] = field(default_factory=list)
    compared: list[list[Format]] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)
    refused_gguf: bool = False

    def train_model(
        self,
        base: Path,
        data: Any,
        recipe: Any,
        out: Path,
        checkpoints: Path,
        report: Any,
        *,
        number_type: NumberType,
        on_checkpoint: Callable[[Path], None] | None = None,
        processes: TrainingProcesses | None = None,
        progress: ProgressFile | None = None,
        sharded: bool = False,
    ) -> Any:
        """Write an adapter or a trained model."""
        self.devices.append(processes.size if processes else 0)
        self.sharded.append(sharded)
        self.number_types.append(number_type)
        self.recipes.append(recipe)
        self._run(Stage.TRAIN, out)
        if recipe.method is Method.FULL:
            write_model(out, seed=1)
        else:
            (out / "adapter_model.safetensors").write_bytes(b"adapter")
        report(1, {"loss": 0.5})
        return TrainingSummary(3, 30, 10.0, 3.0, points=CURVE)

    def merge_adapter(self, base: Path, adapter: Path, out: Path, *, dequantized: bool = False) -> MergeSummary:
        """Write different weights of the same shape."""
        self._run(Stage.MERGE, out)
        write_model(out, seed=1)
        return MergeSummary(2, 0.5, 0.1)

    def check_base(self, base: Path, recipe: Recipe, capabilities: Any, engine: Any) -> None:
        """Reject GPTQ with a group size of 128."""
        if Format.GPTQ in recipe.formats and recipe.quantize.group_size == 128:
            raise RecipeError("quantize.group_size is 128")

    def quantize_to_4_bits(
        self, format: Format, merged: Path, examples: Any, recipe: Any, out: Path, *, number_type: NumberType
    ) -> QuantizeSummary:
        """Write a quantized model."""
        self.number_types.append(number_type)
        self._run(QUANTIZE_STAGES[format], out)
        write_model(out, quantization=GPTQ)
        return QuantizeSummary(2, 8, 80, "layer.0", 0.01, 2.0)

    def quantize_to_8_bits(self, merged: Path, out: Path, format: Format) -> RoundingSummary:
        """Write a quantized model."""
        self._run(QUANTIZE_STAGES[format], out)
        write_model(out, quantization={"quant_method": "compressed-tensors", "format": format})
        return RoundingSummary(2, 1.0)

    def export_gguf(self, merged: Path, out: Path, name: str, examples: Any) -> GgufSummary:
        """Write a GGUF file."""
        self._run(Stage.EXPORT_GGUF, out)
        (out / "tiny-q8_0.gguf").write_bytes(b"GGUF")
        return GgufSummary(out / "tiny-q8_0.gguf", 4, "gpt-2", len(examples), 0.01, "blk.0")

    def check_gguf(self, base: Path, kwargs: Any, examples: Any) -> None:
        """Refuse a base whose texts llama.cpp would split differently."""
        if self.refused_gguf:
            raise TrainingError("1 of 2 held-out examples would have different token ids in llama.cpp")

    def make_report(self, made: Made, recipe: Any, compared: Any, judged: int, *, number_type: Any) -> ParityReport:
        """Return a report in which the checks in `unequal` fail."""
        self.compared.append(sorted(made.formats))
        return make_parity(*self.unequal)

    def _run(self, stage: Stage, out: Path) -> None:
        self.ran.append(stage)
        out.mkdir(parents=True, exist_ok=True)
        if stage in self.broken:
            (out / "half-written").touch()
            raise KeyboardInterrupt
