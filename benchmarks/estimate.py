"""How near `svc estimate` comes: memory and time of each method, estimated and real, on this machine.

Each training runs in a process of its own, as `svc train` runs it, on the example task with the real base model. Times
mean something on an idle machine alone; memory does anywhere.
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
from svc.settings import load_settings
from svc.terminal import counting, output, print_json, quiet_libraries
from trainer.estimate.devices import ComputeDevice, this_machine
from trainer.recipe.file import load_recipe
from trainer.recipe.sections import Method

TASK = Path(__file__).parents[1] / "examples" / "debian-triage"
MEMORY, TIME = 0.2, 0.3
"""How far from the real figures estimates may be."""
_METHOD = click.Choice(list(Method), case_sensitive=False)


@dataclass(frozen=True, slots=True)
class Case:
    """One training.

    Attributes:
        base: folder of the base model.
        steps: each of `batch_size` examples.
    """

    method: Method
    batch_size: int
    steps: int
    base: Path
    number_type: NumberType

    @property
    def overrides(self) -> tuple[str, ...]:
        """What it changes of the example's recipe; the default step size is right for every method."""
        return (f"method={self.method}", "train.learning_rate=1e-4", f"train.batch_size={self.batch_size}")


@dataclass(frozen=True, slots=True)
class Compared:
    """Bytes and seconds, estimated and real."""

    method: Method
    batch_size: int
    estimated_memory: float
    memory: float
    estimated_seconds: float
    seconds: float

    @property
    def memory_ratio(self) -> float:
        """Estimated by real."""
        return self.estimated_memory / self.memory

    @property
    def time_ratio(self) -> float:
        """Estimated by real."""
        return self.estimated_seconds / self.seconds


def compare(case: Case, device: ComputeDevice) -> Compared:
    """Trains in this process, which must have done nothing else."""
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
    """All of them, one after the other, each in a process of its own."""
    found = []
    with counting("trainings", len(cases)) as advance:
        for case in cases:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found.append(pool.submit(compare, case, device).result())
            advance()
    return found


@click.command()
@click.option("--steps", type=click.IntRange(2), default=4, show_default=True, help="Steps of a run.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(4, 16), show_default=True)
@click.option("--method", "methods", type=_METHOD, multiple=True, default=tuple(Method))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def main(steps: int, batches: tuple[int, ...], methods: tuple[Method, ...], as_json: bool) -> None:
    """Compare estimates with real trainings of the example task."""
    from trainer.base_model.resolve import resolve_base

    settings = load_settings()
    capabilities = read_capabilities(settings.home)
    device = this_machine(capabilities, read_machine(gpus=True), settings.home)
    base = resolve_base(load_recipe(TASK / "recipe.yaml").base, settings.base_cache).folder
    cases = [Case(method, size, steps, base, device.number_type) for size in batches for method in methods]
    found = measure(cases, device)
    if as_json:
        print_json({"machine": capabilities.instruction_set, "runs": [asdict(one) for one in found]})
    else:
        _show(found, capabilities, device)


def _show(found: Sequence[Compared], capabilities: DeviceCapabilities, device: ComputeDevice) -> None:
    from rich.table import Table

    output.print(f"{device.label} ({capabilities.training_reason}), {device.speed / 1e9:.0f} GFLOP/s in products")
    table = Table("method", "batch", "memory, GB", "estimated", "ratio", "time, s", "estimated", "ratio", box=None)
    for one in found:
        memory = (f"{one.memory / 1e9:.2f}", f"{one.estimated_memory / 1e9:.2f}", f"{one.memory_ratio:.2f}")
        time = (f"{one.seconds:.0f}", f"{one.estimated_seconds:.0f}", f"{one.time_ratio:.2f}")
        table.add_row(one.method, str(one.batch_size), *memory, *time)
    output.print(table)
    near = sum(abs(one.memory_ratio - 1) <= MEMORY for one in found)
    timely = sum(abs(one.time_ratio - 1) <= TIME for one in found)
    output.print(f"memory within {MEMORY:.0%} in {near} of {len(found)}, time within {TIME:.0%} in {timely}")


if __name__ == "__main__":
    main()
