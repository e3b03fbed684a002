"""How fast training is beside a plain TRL script, and beside TRL that groups examples by length.

All three train the same LoRA on the same tokens with the same batch, precision and schedule, in rounds of one run each,
every run in a process of its own. Tokens are those of the examples: padding is work, but nobody's.

Speed is worth nothing if something else is learnt. So plain TRL trains once more, in our order of examples, and the
loss of each step is compared with ours. (In their own orders, losses of a step are of other examples.)
"""

import resource
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from benchmarks.interval import interval
from svc.dataset.example import ChatExample
from svc.dataset.reader import read_examples
from svc.settings import load_settings
from svc.terminal import counting, output, print_json
from trainer.recipe import Recipe, load_recipe

TASK = Path(__file__).parents[1] / "examples" / "debian-triage"
BATCH = 16
CLAIM = 3.0
"""Times plain TRL's speed, at least, on a CPU: what the project promises."""
SAME = 0.01
"""Relative difference of the mean loss that passes as the same training."""


class Contestant(StrEnum):
    """Who trains."""

    OURS = "tuneserve"
    TRL = "TRL"
    GROUPED = "TRL, group_by_length"
    ALIKE = "TRL, our order"


RIVALS = (Contestant.TRL, Contestant.GROUPED)


@dataclass(frozen=True, slots=True)
class Task:
    """What everybody trains.

    Attributes:
        base: folder of the base model.
        recipe: what to train, and how.
        examples: what is learnt, in one pass.
    """

    base: Path
    recipe: Recipe
    examples: tuple[ChatExample, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One training.

    Attributes:
        tokens: of the examples.
        seconds: from the first step's start to the last one's end.
        peak_memory: of the process, bytes.
        losses: of each step, nats an answer token.
    """

    tokens: int
    seconds: float
    peak_memory: int
    losses: tuple[float, ...]

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


Round = Mapping[Contestant, Run]


def train(contestant: Contestant, task: Task) -> Run:
    """Trains in this process."""
    with tempfile.TemporaryDirectory() as folder:
        one = _train_ours if contestant is Contestant.OURS else _train_trl
        tokens, seconds, losses = one(contestant, task, Path(folder))
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Run(tokens, seconds, kibibytes * 1024, losses)


def _train_ours(_: Contestant, task: Task, folder: Path) -> tuple[int, float, tuple[float, ...]]:
    """As `svc train` does."""
    from trainer.sft import TrainingData, train_model

    summary = train_model(task.base, TrainingData(task.examples), task.recipe, folder / "out", folder / "checkpoints")
    return summary.tokens, summary.seconds, tuple(point.loss for point in summary.loss_curve)


def _train_trl(contestant: Contestant, task: Task, folder: Path) -> tuple[int, float, tuple[float, ...]]:
    """As TRL's quick start does: what is not said here is its default."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, set_seed
    from trl import SFTConfig, SFTTrainer

    from trainer.adapters import adapter_config
    from trainer.batch_order import BatchOrder
    from trainer.sft import count_steps
    from trainer.targets import target_modules
    from trainer.training_example import load_tokenizer, stop_tokens, tokenize_examples

    recipe, tokenizer = task.recipe, load_tokenizer(task.base)
    rows = tokenize_examples(tokenizer, task.examples, stop_tokens(task.base, tokenizer))
    set_seed(recipe.train.seed)  # the adapter's start
    model = AutoModelForCausalLM.from_pretrained(task.base, dtype=torch.bfloat16)
    steps, targets = count_steps(len(rows), recipe), target_modules(model, recipe.adapter.targets)
    grouping = {"train_sampling_strategy": "group_by_length"} if contestant is Contestant.GROUPED else {}

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            learning_rate=recipe.learning_rate,
            lr_scheduler_type=recipe.train.schedule.value,
            warmup_steps=round(recipe.train.warmup_ratio * steps),
            num_train_epochs=recipe.train.epochs,
            per_device_train_batch_size=recipe.train.batch_size,
            seed=recipe.train.seed,
            bf16=True,
            use_cpu=not torch.accelerator.is_available(),  # bf16 needs to be told
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            **grouping,
        ),
        train_dataset=Dataset.from_list([row.as_row() for row in rows]),
        processing_class=tokenizer,
        peft_config=adapter_config(recipe, targets, steps),
    )
    if contestant is Contestant.ALIKE:
        order = BatchOrder([len(row.input_ids) for row in rows], recipe.train.batch_size, recipe.train.seed)
        trainer._get_train_sampler = lambda *_: order
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return sum(len(row.input_ids) for row in rows), seconds, losses


def _in_own_process(contestant: Contestant, task: Task) -> Run:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(train, contestant, task).result()


def measure(tasks: Sequence[Task], curve: Task) -> tuple[list[Round], Round]:
    """One round for each task, each in another order of contestants; and the loss curves, of ours and of TRL."""
    contestants, alike = [Contestant.OURS, *RIVALS], (Contestant.OURS, Contestant.ALIKE)
    rounds: list[Round] = []
    with counting("trainings", len(contestants) * len(tasks) + len(alike)) as advance:

        def run(contestant: Contestant, task: Task) -> Run:
            made = _in_own_process(contestant, task)
            advance()
            return made

        for number, task in enumerate(tasks):
            turn = number % len(contestants)
            rounds.append({one: run(one, task) for one in contestants[turn:] + contestants[:turn]})
        return rounds, {one: run(one, curve) for one in alike}


def summary(rounds: Sequence[Round], curves: Round) -> dict[str, Any]:
    """Medians; how many times as fast as each rival, with the interval of its mean; how the losses agree."""
    ours, alike = curves[Contestant.OURS].losses, curves[Contestant.ALIKE].losses
    return {
        "tokens_per_second": {one: statistics.median(each[one].speed for each in rounds) for one in rounds[0]},
        "peak_memory": {one: statistics.median(each[one].peak_memory for each in rounds) for one in rounds[0]},
        "times_as_fast": {rival: _times_as_fast(rounds, rival) for rival in RIVALS},
        "losses": list(zip(ours, alike, strict=True)),
        "mean_loss_difference": abs(statistics.fmean(ours) / statistics.fmean(alike) - 1),
    }


def _times_as_fast(rounds: Sequence[Round], rival: Contestant) -> dict[str, Any]:
    ratios = [each[Contestant.OURS].speed / each[rival].speed for each in rounds]
    return {"median": statistics.median(ratios), "interval": interval(ratios)}


@click.command()
@click.option("--pairs", type=click.IntRange(1), default=5, show_default=True, help="Rounds, one run of each.")
@click.option("--steps", type=click.IntRange(1), default=4, show_default=True, help="Steps of a run.")
@click.option("--curve-steps", type=click.IntRange(1), default=8, show_default=True, help="Steps of a loss curve.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def main(pairs: int, steps: int, curve_steps: int, as_json: bool) -> None:
    """Measure training beside plain TRL on the example task: 25 minutes on two cores."""
    from trainer.base_model import resolve_base

    recipe = load_recipe(TASK / "recipe.yaml", (f"train.batch_size={BATCH}", "train.epochs=1"))
    base = resolve_base(recipe.base, load_settings().base_cache).folder
    examples = read_examples(TASK / "train.jsonl")
    size = steps * BATCH
    tasks = [Task(base, recipe, tuple(examples[start : start + size])) for start in range(0, pairs * size, size)]
    rounds, curves = measure(tasks, Task(base, recipe, tuple(examples[: curve_steps * BATCH])))
    found = summary(rounds, curves)
    if as_json:
        print_json({**found, "rounds": [{one: asdict(run) for one, run in each.items()} for each in rounds]})
    else:
        _show(found, len(rounds))


def _show(found: Mapping[str, Any], rounds: int) -> None:
    from rich.table import Table

    output.print(f"{rounds} rounds; batches of {BATCH}; every figure the median")
    table = Table("", "tokens/s", "peak memory, GB", f"{Contestant.OURS} is faster by", box=None)
    for one, speed in found["tokens_per_second"].items():
        times = found["times_as_fast"].get(one)
        low, high = times["interval"] if times else (0, 0)
        faster = f"{times['median']:.2f} x  (mean within {low:.2f} to {high:.2f})" if times else ""
        table.add_row(one, f"{speed:.0f}", f"{found['peak_memory'][one] / 1e9:.2f}", faster)
    output.print(table)
    output.print(f"at least {CLAIM:g} x plain TRL is promised on a CPU\n")
    curve = Table("step", f"loss, {Contestant.OURS}", f"loss, {Contestant.ALIKE}", "difference", box=None)
    for step, (ours, other) in enumerate(found["losses"], start=1):
        curve.add_row(str(step), f"{ours:.4f}", f"{other:.4f}", f"{ours / other - 1:+.2%}")
    output.print(curve)
    output.print(f"mean loss differs by {found['mean_loss_difference']:.2%}; at most {SAME:.0%} is promised")


if __name__ == "__main__":
    main()
