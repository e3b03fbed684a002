"""Compares each stage's estimated memory with its measured peak resident memory on this machine.

The model has random weights in the shape given by a config.json, so that only the tokenizer of the
example task's base is downloaded. Each stage runs in a separate process with the libraries of `svc
train` loaded. Mapped file pages count, as in the system's own figures.
"""

import json
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ParamSpec, TypeVar

import click

from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType, read_capabilities
from svc.invocation import print_json
from svc.settings.load import load_settings
from svc.terminal import console, output, quiet_libraries
from svc.version import Format
from trainer.recipe.file import load_recipe
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import Stage

TASK = Path(__file__).parents[1] / "examples" / "debian-triage"
MEMORY = 0.2
"""Accepted relative error of a memory estimate."""
MEASURED = (Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE, Stage.PARITY)
"""Stages that are measured. All others run an engine, whose memory `svc.engine.vllm.headroom` estimates."""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_STAGE = click.Choice(MEASURED, case_sensitive=False)
_COMPARED = 8
"""Number of examples compared by the parity report."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Case:
    """A model and the settings for measuring its stages.

    Attributes:
        config: folder with the config.json that defines the model's shape.
        layers: number of the model's layers to use, or None for all.
        tokenizer: model folder with a tokenizer whose ids all have embedding rows.
        work: folder for the base, the adapter and the stages' output.
    """

    config: Path
    layers: int | None
    recipe: Recipe
    tokenizer: Path
    number_type: NumberType
    work: Path

    @property
    def base(self) -> Path:
        """Return the folder of the base model with random weights."""
        return self.work / "base"


@dataclass(frozen=True, slots=True)
class Measured:
    """Measured peak memory of a stage, in bytes."""

    stage: Stage
    estimated: float
    measured: float

    @property
    def ratio(self) -> float:
        """Return the ratio of estimated to measured memory."""
        return self.estimated / self.measured


def prepare(case: Case) -> None:
    """Write the base and an adapter with random weights."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.model.peft_config import add_adapter

    quiet_libraries()
    content = json.loads((case.config / "config.json").read_text("utf-8"))
    if case.layers is not None:
        content["num_hidden_layers"] = case.layers
        content.pop("layer_types", None)
    content |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "dtype": "bfloat16"}
    config = AutoConfig.for_model(**content)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(case.base)
    for name in _TOKENIZER:
        if (case.tokenizer / name).is_file():
            shutil.copyfile(case.tokenizer / name, case.base / name)
    adapted = add_adapter(model, case.recipe, steps=20)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.01 * torch.randn_like(weight))
    adapted.save_pretrained(case.work / "adapter")


def estimate(case: Case) -> dict[Stage, float]:
    """Return the estimated memory of each stage on this machine, in bytes."""
    from trainer.estimate.batches import read_workload
    from trainer.estimate.devices import CPU_UTILIZATION, HERE, ComputeDevice
    from trainer.estimate.estimate import estimate_device
    from trainer.estimate.model_shape import read_model_shape

    quiet_libraries()
    shape = read_model_shape(case.base, case.recipe.adapter.targets)
    workload = read_workload(_examples(case), case.recipe, case.base)
    utilization = CPU_UTILIZATION[NumberType.BFLOAT16]
    device = ComputeDevice(HERE, HERE, True, case.number_type, 1e12, 1e11, 1e10, utilization)
    stages = estimate_device(case.recipe, shape, workload, device, 2048).stages
    return {stage.stage: stage.peak.ram for stage in stages}


def measure(case: Case, stage: Stage) -> int:
    """Run a stage in this process, which must not have done anything else, and return its peak memory in bytes.

    Quantization runs in a child process, so the memory of both processes is counted.
    """
    import trainer.training.sft  # noqa: F401 - in the memory of `svc train` at every stage
    from trainer.data.chat_template import tokenize_as_trained
    from trainer.evaluation.parity.report import Made, make_report
    from trainer.export.gptq import calibration_type, quantize_to_4_bits
    from trainer.export.merge import merge_adapter
    from trainer.training.sft import train_model
    from trainer.training.summary import TrainingData

    quiet_libraries()
    examples, base, merged = _examples(case), case.base, case.work / "merged"
    match stage:
        case Stage.TRAIN:
            data = TrainingData(examples)
            folders = case.work / "trained", case.work / "checkpoints"
            train_model(base, data, case.recipe, *folders, number_type=case.number_type)
        case Stage.MERGE:
            merge_adapter(base, case.work / "adapter", merged)
        case Stage.QUANTIZE:
            quantize_to_4_bits(
                Format.GPTQ, merged, examples, case.recipe, case.work / "gptq", number_type=case.number_type
            )
        case Stage.PARITY:
            compared = tokenize_as_trained(base, examples[:_COMPARED], {})
            outputs = Made(base, case.work / "adapter", merged, {})
            make_report(outputs, case.recipe, compared, 0, number_type=calibration_type(case.number_type))
        case _:
            raise ValueError(f"{stage} runs an engine")
    own, children = (resource.getrusage(whose).ru_maxrss for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return 1024 * (own + (children if stage is Stage.QUANTIZE else 0))


def _examples(case: Case) -> list[ChatExample]:
    train = case.recipe.train
    count = max(case.recipe.quantize.samples, train.batch_size * (train.steps or 1))
    return list(read_examples(TASK / "train.jsonl")[:count])


@click.command()
@click.argument("config", type=click.Path(path_type=Path, exists=True))
@click.option("--layers", type=click.IntRange(1), help="Number of layers to use.  [default: all]")
@click.option("--stage", "stages", type=_STAGE, multiple=True, default=MEASURED, show_default=True)
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a recipe key.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(config: Path, layers: int | None, stages: Sequence[Stage], overrides: tuple[str, ...], as_json: bool) -> None:
    """Compare each stage's estimated memory with its peak, using random weights in the shape given by CONFIG."""
    from trainer.base_model.resolve import resolve_base

    settings = load_settings()
    few = ("train.batch_size=2", "train.steps=2", "quantize.samples=8", "quantize.group_size=32")
    recipe = load_recipe(TASK / "recipe.yaml", (*few, *overrides))
    tokenizer = resolve_base(recipe.base, settings.base_cache).folder
    number_type = read_capabilities(settings.home).training_type
    with TemporaryDirectory(prefix="stage-memory-") as work:
        case = Case(config, layers, recipe, tokenizer, number_type, Path(work))
        _apart(prepare, case)
        expected = _apart(estimate, case)
        needed = [stage for stage in MEASURED if stage in stages or (stage is Stage.MERGE and stages != (Stage.TRAIN,))]
        peaks = {stage: _apart(measure, case, stage) for stage in needed}
    measured = [Measured(stage, expected[stage], peaks[stage]) for stage in needed if stage in stages]
    if as_json:
        print_json({"model": config.name, "layers": layers, "stages": [asdict(stage) for stage in measured]})
    else:
        _show(measured)


def _apart(work: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
    """Call a function in a separate process and return its result."""
    console.print(f"[dim]{work.__name__} {' '.join(map(str, arguments[1:]))}[/dim]")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments, **named).result()


def _show(measured: Sequence[Measured]) -> None:
    from rich.table import Table

    table = Table("stage", "measured, GB", "estimated", "ratio", box=None)
    for stage in measured:
        table.add_row(stage.stage, f"{stage.measured / 1e9:.2f}", f"{stage.estimated / 1e9:.2f}", f"{stage.ratio:.2f}")
    output.print(table)
    right = sum(abs(stage.ratio - 1) <= MEMORY for stage in measured)
    output.print(f"within {MEMORY:.0%} in {right} of {len(measured)} stages")


if __name__ == "__main__":
    main()
