"""Compares each method's memory and time as predicted by `svc estimate` with real training on this machine.

Each training runs in a separate process, as with `svc train`, on the example task with the real base
model. Times are meaningful only on an idle machine; memory figures are meaningful on any machine.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from svc.dataset.readers.reader import read_examples
from svc.engine.device import DeviceCapabilities, NumberType, read_capabilities
from svc.engine.machine import read_machine
from svc.invocation import print_json
from svc.settings.load import load_settings
from svc.terminal import counting, output, quiet_libraries
from trainer.estimate.devices import ComputeDevice, this_machine
from trainer.recipe.adapter import Method
from trainer.recipe.file import load_recipe

TASK = Path(__file__).parents[1] / "examples" / "debian-triage"
MEMORY, TIME = 0.2, 0.3
"""Accepted relative errors of the memory and time estimates."""
_METHOD = click.Choice(list(Method), case_sensitive=False)


@dataclass(frozen=True, slots=True)
class Case:
    """One training run to estimate and measure.

    Attributes:
        base: folder of the base model.
        steps: number of steps, each of `batch_size` examples.
    """

    method: Method
    batch_size: int
    steps: int
    base: Path
    number_type: NumberType

    @property
    def overrides(self) -> tuple[str, ...]:
        """Return the overrides of the example's recipe. A single learning rate works for every method."""
        return (f"method={self.method}", "train.learning_rate=1e-4", f"train.batch_size={self.batch_size}")


@dataclass(frozen=True, slots=True)
class Compared:
    """Estimated and measured memory in bytes and time in seconds."""

    method: Method
    batch_size: int
    estimated_memory: float
    memory: float
    estimated_seconds: float
    seconds: float

    @property
    def memory_ratio(self) -> float:
        """Return the ratio of estimated to measured memory."""
        return self.estimated_memory / self.memory

    @property
    def time_ratio(self) -> float:
        """Return the ratio of estimated to measured time."""
        return self.estimated_seconds / self.seconds


def compare(case: Case, device: ComputeDevice) -> Compared:
    """Train in the current process, which must not have done anything else, and compare with the estimate."""
    from trainer.estimate.batches import read_workload
    from trainer.estimate.estimate import estimate_device
    from trainer.estimate.model_shape import read_model_shape
    from trainer.training.sft import train_model
    from trainer.training.summary import TrainingData

    quiet_libraries()
    recipe = load_recipe(TASK / "recipe.yaml", case.overrides)
    examples = read_examples(TASK / "train.jsonl")[: case.steps * case.batch_size]
    shape = read_model_shape(case.base, recipe.adapter.targets)
    expected = estimate_device(recipe, shape, read_workload(examples, recipe, case.base), device, 2048)
    with TemporaryDirectory() as folder:
        out, checkpoints = Path(folder) / "out", Path(folder) / "checkpoints"
        data = TrainingData(examples)
        real = train_model(case.base, data, recipe, out, checkpoints, number_type=case.number_type)
    memory = float(real.peak_memory or 0)
    return Compared(case.method, case.batch_size, expected.memory, memory, expected.seconds, real.seconds)


def measure(cases: Sequence[Case], device: ComputeDevice) -> list[Compared]:
    """Run each comparison in a separate process, one after the other, and return the results."""
    compared = []
    with counting("trainings", len(cases)) as advance:
        for case in cases:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                compared.append(pool.submit(compare, case, device).result())
            advance()
    return compared


@click.command()
@click.option("--steps", type=click.IntRange(2), default=4, show_default=True, help="Number of steps per run.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(4, 16), show_default=True)
@click.option("--method", "methods", type=_METHOD, multiple=True, default=tuple(Method))
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(steps: int, batches: tuple[int, ...], methods: tuple[Method, ...], as_json: bool) -> None:
    """Compare estimates with real training runs on the example task."""
    from trainer.base_model.resolve import resolve_base

    settings = load_settings()
    capabilities = read_capabilities(settings.home)
    device = this_machine(capabilities, read_machine(gpus=True), settings.home)
    base = resolve_base(load_recipe(TASK / "recipe.yaml").base, settings.base_cache).folder
    cases = [Case(method, size, steps, base, device.number_type) for size in batches for method in methods]
    runs = measure(cases, device)
    if as_json:
        print_json({"machine": capabilities.instruction_set, "runs": [asdict(run) for run in runs]})
    else:
        _show(runs, capabilities, device)


def _show(runs: Sequence[Compared], capabilities: DeviceCapabilities, device: ComputeDevice) -> None:
    from rich.table import Table

    output.print(f"{device.label} ({capabilities.training_reason}), {device.speed / 1e9:.0f} GFLOP/s in products")
    table = Table("method", "batch", "memory, GB", "estimated", "ratio", "time, s", "estimated", "ratio", box=None)
    for run in runs:
        memory = (f"{run.memory / 1e9:.2f}", f"{run.estimated_memory / 1e9:.2f}", f"{run.memory_ratio:.2f}")
        time = (f"{run.seconds:.0f}", f"{run.estimated_seconds:.0f}", f"{run.time_ratio:.2f}")
        table.add_row(run.method, str(run.batch_size), *memory, *time)
    output.print(table)
    memory_right = sum(abs(run.memory_ratio - 1) <= MEMORY for run in runs)
    time_right = sum(abs(run.time_ratio - 1) <= TIME for run in runs)
    output.print(
        f"memory within {MEMORY:.0%} in {memory_right} of {len(runs)} runs, time within {TIME:.0%} in {time_right}"
    )


if __name__ == "__main__":
    main()
