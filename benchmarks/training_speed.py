"""Compares training speed with a plain TRL script, and with TRL grouping examples by length.

All three train the same LoRA on the same tokens with the same batch, precision and schedule. In each
round every trainer runs once, each in a separate process. Only the tokens of the examples count, not
padding.

All of them use the data type that tuneserve chooses for this device. In float32, TRL runs without
gradient checkpointing, which costs time and saves memory that a CPU has. The utilization of the machine
is shown as the share of its matrix speed: the necessary operations of a step per second, relative to a
bare product of similar shape.

Speeds are comparable only if the trainers learn the same. Plain TRL therefore trains once more in our
order of examples, and the loss of each step is compared with ours. (In a different order, a step
contains different examples and so has a different loss.)

On an NVIDIA GPU, two more trainers take part: TRL with FlashAttention and Liger where they are installed, and
Unsloth where its interpreter is known. Both train in our order in every run, so that their losses are
comparable too. All trainers use gradient checkpointing or none does, as `svc train` chooses for the GPU's
free memory, and memory is that of the GPU. The GPU part has never been run.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from benchmarks.interval import interval
from benchmarks.matrix_share import needed_flops, read_shape
from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType, read_capabilities
from svc.invocation import print_json
from svc.settings.engine import Device
from svc.settings.load import load_settings
from svc.terminal import counting, output
from trainer.estimate.batches import plan_batches, read_workload
from trainer.estimate.checkpointing import choose_checkpointing
from trainer.estimate.devices import HERE, choose_devices, measure_matrix_speed
from trainer.estimate.estimate import estimate_recipe
from trainer.estimate.model_shape import read_model_shape
from trainer.model.acceleration import Acceleration, Attention, Facts, choose_acceleration, machine_facts
from trainer.recipe.file import load_recipe
from trainer.recipe.recipe import Recipe

TASK = Path(__file__).parents[1] / "examples" / "debian-triage"
BATCH = 16
CLAIM = 3.0
"""Minimum speed relative to plain TRL on a CPU, as promised by the project."""
SHARE = 0.7
"""Share of the machine's matrix speed that our trainer should reach at least."""
SAME = 0.01
"""Maximum relative difference of the mean losses of two training runs that count as equivalent."""


class Contestant(StrEnum):
    """A trainer in the comparison."""

    OURS = "tuneserve"
    TRL = "TRL"
    GROUPED = "TRL, group_by_length"
    ALIKE = "TRL, our order"
    KERNELS = "TRL, installed kernels, our order"
    UNSLOTH = "Unsloth, our order"


RIVALS = (Contestant.TRL, Contestant.GROUPED)
UNSLOTH_PYTHON = "UNSLOTH_PYTHON"
"""Environment variable with the interpreter that has Unsloth, if it is not this one."""


def choose_rivals(facts: Facts, unsloth: str | None) -> tuple[Contestant, ...]:
    """Return the trainers with which ours is compared on a machine.

    Args:
        unsloth: interpreter that has Unsloth, or None if there is none.
    """
    if facts.capability is None:
        return RIVALS
    chosen = choose_acceleration(facts)
    kernels = (Contestant.KERNELS,) if chosen.liger_kernels or chosen.attention is not Attention.SDPA else ()
    return RIVALS + kernels + ((Contestant.UNSLOTH,) if unsloth else ())


def find_unsloth() -> str | None:
    """Return the interpreter that has Unsloth, or None if there is none."""
    return os.environ.get(UNSLOTH_PYTHON) or (sys.executable if find_spec("unsloth") else None)


@dataclass(frozen=True, slots=True)
class Task:
    """The training task that all contestants run.

    Attributes:
        base: folder of the base model.
        examples: training examples, used for exactly one epoch.
        number_type: data type of the matrix products.
    """

    base: Path
    recipe: Recipe
    examples: tuple[ChatExample, ...]
    number_type: NumberType


@dataclass(frozen=True, slots=True)
class Run:
    """Result of one training.

    Attributes:
        tokens: number of tokens in the examples.
        seconds: time from the start of the first step to the end of the last.
        peak_memory: peak memory of the process in bytes, or on a GPU, of the tensors there.
        losses: loss of each step in nats per answer token.
        flops: number of necessary floating-point operations, or None if not counted.
        matrix_speed: operations per second of bare matrix products in the same process, or None if not
            measured.
    """

    tokens: int
    seconds: float
    peak_memory: int
    losses: tuple[float, ...]
    flops: float | None = None
    matrix_speed: float | None = None

    @property
    def speed(self) -> float:
        """Return the training speed in tokens per second."""
        return self.tokens / self.seconds

    @property
    def share(self) -> float | None:
        """Return the share of the machine's matrix speed that was reached, or None if it was not measured."""
        if self.flops is None or self.matrix_speed is None:
            return None
        return self.flops / self.seconds / self.matrix_speed


Round = Mapping[Contestant, Run]


def train(contestant: Contestant, task: Task) -> Run:
    """Run the training task with a contestant in the current process."""
    with tempfile.TemporaryDirectory() as folder:
        if contestant is Contestant.UNSLOTH:
            return _train_unsloth(task, Path(folder))
        run = _train_ours if contestant is Contestant.OURS else _train_trl
        tokens, seconds, losses = run(contestant, task, Path(folder))
    memory = _peak_memory()
    if contestant is not Contestant.OURS:
        return Run(tokens, seconds, memory, losses)
    return Run(tokens, seconds, memory, losses, *_machine_share(task))


def _peak_memory() -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # ru_maxrss is in KiB


def _train_ours(_: Contestant, task: Task, folder: Path) -> tuple[int, float, tuple[float, ...]]:
    """Train as `svc train` does."""
    from trainer.training.sft import train_model
    from trainer.training.summary import TrainingData

    summary = train_model(
        task.base,
        TrainingData(task.examples),
        task.recipe,
        folder / "out",
        folder / "checkpoints",
        number_type=task.number_type,
    )
    return summary.tokens, summary.seconds, tuple(point.loss for point in summary.points if point.loss is not None)


def _train_trl(contestant: Contestant, task: Task, folder: Path) -> tuple[int, float, tuple[float, ...]]:
    """Train as in TRL's quick start, with TRL's defaults for all other options. `KERNELS` also uses the installed
    packages that TRL supports.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, set_seed
    from trl import SFTConfig, SFTTrainer

    from trainer.data.chat_template import load_tokenizer, stop_tokens, tokenize_examples, training_row
    from trainer.data.length_grouped_sampler import LengthGroupedSampler
    from trainer.model.peft_config import adapter_config
    from trainer.model.target_modules import target_modules
    from trainer.training.arguments import count_steps

    recipe, tokenizer = task.recipe, load_tokenizer(task.base)
    rows = tokenize_examples(tokenizer, task.examples, stop_tokens(task.base, tokenizer), {})
    set_seed(recipe.train.seed)  # for the adapter's initial weights
    loading: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if contestant is Contestant.KERNELS:
        loading, options = kernel_options(choose_acceleration(machine_facts()))
    elif contestant is Contestant.GROUPED:
        options = {"train_sampling_strategy": "group_by_length"}
    asked = recipe.train.gradient_checkpointing
    model = AutoModelForCausalLM.from_pretrained(task.base, dtype=getattr(torch, task.number_type), **loading)
    steps, targets = count_steps(len(rows), recipe.train), target_modules(model, recipe.adapter.targets)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            learning_rate=recipe.learning_rate(model.config.hidden_size),
            lr_scheduler_type=recipe.train.schedule.value,
            warmup_steps=round(recipe.train.warmup_ratio * steps),
            num_train_epochs=recipe.train.epochs,
            per_device_train_batch_size=recipe.train.batch_size,
            seed=recipe.train.seed,
            bf16=task.number_type is NumberType.BFLOAT16,
            fp16=task.number_type is NumberType.FLOAT16,
            gradient_checkpointing=task.number_type is not NumberType.FLOAT32 if asked is None else asked,
            use_cpu=not torch.accelerator.is_available(),  # required for bf16
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            **options,
        ),
        train_dataset=Dataset.from_list([training_row(row) for row in rows]),
        processing_class=tokenizer,
        peft_config=adapter_config(recipe, targets, steps),
    )
    if contestant in (Contestant.ALIKE, Contestant.KERNELS):
        order = LengthGroupedSampler([len(row.input_ids) for row in rows], recipe.train.batch_size, recipe.train.seed)
        trainer._get_train_sampler = lambda *_: order
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return sum(len(row.input_ids) for row in rows), seconds, losses


def kernel_options(chosen: Acceleration) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments for loading a model and for TRL's trainer with which TRL uses the chosen kernels."""
    options: dict[str, Any] = {"use_liger_kernel": chosen.liger_kernels, "padding_free": chosen.padding_free}
    if chosen.padding_free:  # TRL would warn of a maximum length that it does not apply; no row of the task is longer
        options["max_length"] = None
    return {"attn_implementation": chosen.attention.value}, options


def unsloth_job(task: Task) -> dict[str, Any]:
    """Return a task for benchmarks.unsloth_training, as a JSON object with the examples in our order."""
    from trainer.data.chat_template import load_tokenizer, stop_tokens, tokenize_examples, training_row
    from trainer.data.length_grouped_sampler import LengthGroupedSampler
    from trainer.model.config import read_width
    from trainer.model.layer_shapes import empty_model, linear_layers
    from trainer.model.target_modules import ALL_LINEAR, target_modules
    from trainer.training.arguments import count_steps

    recipe, tokenizer, model = task.recipe, load_tokenizer(task.base), empty_model(task.base)
    rows = tokenize_examples(tokenizer, task.examples, stop_tokens(task.base, tokenizer), {})
    order = LengthGroupedSampler([len(row.input_ids) for row in rows], recipe.train.batch_size, recipe.train.seed)
    targets = target_modules(model, recipe.adapter.targets)
    if targets == ALL_LINEAR:
        targets = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
    return {
        "base": str(task.base),
        "rows": [training_row(rows[index]) for index in order],
        "number_type": task.number_type,
        "max_length": recipe.train.max_length,
        "rank": recipe.rank,
        "alpha": recipe.alpha,
        "dropout": recipe.adapter.dropout,
        "rslora": recipe.adapter.rslora,
        "targets": targets,
        "checkpointing": bool(recipe.train.gradient_checkpointing),
        "learning_rate": recipe.learning_rate(read_width(task.base)),
        "schedule": recipe.train.schedule.value,
        "warmup_steps": round(recipe.train.warmup_ratio * count_steps(len(rows), recipe.train)),
        "batch_size": recipe.train.batch_size,
        "seed": recipe.train.seed,
    }


def _train_unsloth(task: Task, folder: Path) -> Run:
    """Train with Unsloth in a separate process."""
    job, result, script = folder / "job.json", folder / "result.json", Path(__file__).with_name("unsloth_training.py")
    content = unsloth_job(task)
    job.write_text(json.dumps(content), "utf-8")
    subprocess.run([find_unsloth() or sys.executable, "-I", script, job, result], check=True)
    measured = json.loads(result.read_text("utf-8"))
    tokens = sum(len(row["input_ids"]) for row in content["rows"])
    return Run(tokens, measured["seconds"], measured["peak_memory"], tuple(measured["losses"]))


def _machine_share(task: Task) -> tuple[float, float]:
    """Return the operations that our training needs, and the speed of bare products with equal tokens per step."""
    from trainer.data.chat_template import load_tokenizer, stop_tokens, tokenize_examples
    from trainer.model.load import ModelForm, load_model
    from trainer.model.peft_config import add_adapter
    from trainer.training.arguments import count_steps

    tokenizer = load_tokenizer(task.base)
    rows = tokenize_examples(tokenizer, task.examples, stop_tokens(task.base, tokenizer), {})
    batches = plan_batches(rows, task.recipe.train)
    form = ModelForm(task.number_type, task.recipe.base_quantization, task.recipe.adapter_type is None)
    model = load_model(task.base, form)
    shape = read_shape(add_adapter(model, task.recipe, count_steps(len(rows), task.recipe.train)))
    tokens = round(statistics.fmean(batch.computed for batch in batches))
    config = model.config
    speed = measure_matrix_speed(tokens, config.hidden_size, config.intermediate_size, task.number_type)
    return sum(needed_flops(shape, batch) for batch in batches), speed


def _in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a separate process, so that the current process takes no GPU memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def fitted_checkpointing(recipe: Recipe, base: Path, examples: Sequence[ChatExample], home: Path) -> bool:
    """Return whether `svc train` would use gradient checkpointing on this machine."""
    shape, workload = read_model_shape(base, recipe.adapter.targets), read_workload(examples, recipe, base)
    estimate = estimate_recipe(recipe, shape, workload, choose_devices((HERE,), home), recipe.train.max_length)
    return choose_checkpointing(estimate).enabled


def measure(tasks: Sequence[Task], curve: Task, rivals: Sequence[Contestant] = RIVALS) -> tuple[list[Round], Round]:
    """Return one round per task, rotating the order of contestants, plus the loss curves of our trainer and of all
    that train in its order.
    """
    contestants = [Contestant.OURS, *rivals]
    same_order = (Contestant.OURS, Contestant.ALIKE, *(rival for rival in rivals if rival not in RIVALS))
    rounds: list[Round] = []
    with counting("trainings", len(contestants) * len(tasks) + len(same_order)) as advance:

        def run(contestant: Contestant, task: Task) -> Run:
            result: Run = _in_own_process(train, contestant, task)
            advance()
            return result

        for number, task in enumerate(tasks):
            turn = number % len(contestants)
            order = contestants[turn:] + contestants[:turn]
            rounds.append({contestant: run(contestant, task) for contestant in order})
        return rounds, {contestant: run(contestant, curve) for contestant in same_order}


def summary(rounds: Sequence[Round], curves: Round) -> dict[str, Any]:
    """Return medians, the speed relative to each rival with the interval of its mean, and loss differences."""
    ours = curves[Contestant.OURS].losses
    others = {contestant: run.losses for contestant, run in curves.items() if contestant is not Contestant.OURS}
    differences = {name: abs(statistics.fmean(ours) / statistics.fmean(losses) - 1) for name, losses in others.items()}
    return {
        "tokens_per_second": {
            contestant: statistics.median(each[contestant].speed for each in rounds) for contestant in rounds[0]
        },
        "peak_memory": {
            contestant: statistics.median(each[contestant].peak_memory for each in rounds) for contestant in rounds[0]
        },
        "times_as_fast": {rival: _times_as_fast(rounds, rival) for rival in rounds[0] if rival is not Contestant.OURS},
        "share": _median_of(each[Contestant.OURS].share for each in rounds),
        "matrix_speed": _median_of(each[Contestant.OURS].matrix_speed for each in rounds),
        "losses": list(zip(ours, *others.values(), strict=True)),
        "mean_loss_difference": differences.pop(Contestant.ALIKE),
        "other_loss_differences": differences,
    }


def _median_of(values: Iterable[float | None]) -> float | None:
    """Return the median of the values that were measured, or None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _times_as_fast(rounds: Sequence[Round], rival: Contestant) -> dict[str, Any]:
    ratios = [each[Contestant.OURS].speed / each[rival].speed for each in rounds]
    return {"median": statistics.median(ratios), "interval": interval(ratios)}


@click.command()
@click.option(
    "--pairs",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Number of rounds, each with one run per trainer.",
)
@click.option("--steps", type=click.IntRange(1), default=4, show_default=True, help="Number of steps per run.")
@click.option(
    "--curve-steps", type=click.IntRange(1), default=8, show_default=True, help="Number of steps per loss curve."
)
@click.option(
    "--number-type",
    type=click.Choice(list(NumberType)),
    help="Data type to use.  [default: this device's]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(pairs: int, steps: int, curve_steps: int, number_type: NumberType | None, as_json: bool) -> None:
    """Compare training with plain TRL on the example task, which takes 25 minutes on two cores. On an NVIDIA GPU, also
    with TRL's kernels and Unsloth, where they are installed.
    """
    from trainer.base_model.resolve import resolve_base

    settings = load_settings()
    capabilities = read_capabilities(settings.home)
    number_type = number_type or capabilities.training_type
    recipe = load_recipe(TASK / "recipe.yaml", (f"train.batch_size={BATCH}", "train.epochs=1"))
    base = resolve_base(recipe.base, settings.base_cache).folder
    examples = read_examples(TASK / "train.jsonl")
    size = steps * BATCH
    rivals: Sequence[Contestant] = RIVALS
    gpu = None
    if capabilities.training_device is Device.CUDA:
        rivals = choose_rivals(_in_own_process(machine_facts), find_unsloth())
        checkpointing = _in_own_process(fitted_checkpointing, recipe, base, examples[:size], settings.home)
        recipe = recipe.changed({"train.gradient_checkpointing": checkpointing})
        name = capabilities.gpu.name if capabilities.gpu else "a GPU"
        gpu = f"{name}, checkpointing {'on' if checkpointing else 'off'}"
    starts = range(0, pairs * size, size)
    tasks = [Task(base, recipe, tuple(examples[start : start + size]), number_type) for start in starts]
    rounds, curves = measure(tasks, Task(base, recipe, tuple(examples[: curve_steps * BATCH]), number_type), rivals)
    result = summary(rounds, curves)
    if as_json:
        print_json(
            {
                "number_type": number_type,
                "gpu": gpu,
                **result,
                "rounds": [{contestant: asdict(run) for contestant, run in each.items()} for each in rounds],
            }
        )
    else:
        show(result, tuple(curves), len(rounds), number_type, gpu)


def show(
    result: Mapping[str, Any], curves: Sequence[Contestant], rounds: int, number_type: NumberType, gpu: str | None
) -> None:
    """Print the results as tables.

    Args:
        curves: the trainers whose losses are in `result`, ours first.
        gpu: name and options of the GPU, or None on a CPU.
    """
    from rich.table import Table

    output.print(f"{rounds} rounds in {number_type}{f' on {gpu}' if gpu else ''}; batches of {BATCH}; medians")
    table = Table("", "tokens/s", "peak memory, GB", f"{Contestant.OURS} is faster by", box=None)
    for contestant, speed in result["tokens_per_second"].items():
        times = result["times_as_fast"].get(contestant)
        low, high = times["interval"] if times else (0, 0)
        faster = f"{times['median']:.2f} x  (mean within {low:.2f} to {high:.2f})" if times else ""
        table.add_row(contestant, f"{speed:.0f}", f"{result['peak_memory'][contestant] / 1e9:.2f}", faster)
    output.print(table)
    if gpu is None:
        output.print(f"promised on a CPU: at least {CLAIM:g} x plain TRL")
    output.print(
        f"{Contestant.OURS} reaches {result['share']:.2f} of this machine's matrix speed in {number_type}, "
        f"{result['matrix_speed'] / 1e9:.0f} GFLOP/s; goal: {SHARE:g}\n"
    )
    titles = [title for other in curves[1:] for title in (f"loss, {other}", "difference")]
    curve = Table("step", f"loss, {Contestant.OURS}", *titles, box=None)
    for step, (ours, *others) in enumerate(result["losses"], start=1):
        cells = [cell for other in others for cell in (f"{other:.4f}", f"{ours / other - 1:+.2%}")]
        curve.add_row(str(step), f"{ours:.4f}", *cells)
    output.print(curve)
    output.print(f"mean loss differs by {result['mean_loss_difference']:.2%}; promised: at most {SAME:.0%}")
    for other, difference in result["other_loss_differences"].items():
        output.print(f"mean loss differs from that of {other} by {difference:.2%}")


if __name__ == "__main__":
    main()
