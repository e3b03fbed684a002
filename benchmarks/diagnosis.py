"""Measures how accurate training diagnosis is: false positives on healthy runs, and detected faults.

Every run is a real training with this project's trainer, on a two-layer model that trains in seconds.
The task is the letter task of tests/trainer/evaluation/diagnosis, with different data, batch size, learning rate,
lengths and steps for each seed. A run is healthy by construction: it has a usual learning rate, enough
steps and few wrong labels. A fault changes one property of such a run. The diagnosis rules were not
derived from these runs. The results may not carry over to other models and tasks.
"""

import random
import string
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import click

from svc.dataset.schema.example import ChatExample, Message, Role
from svc.engine.device import NumberType
from svc.errors import TrainingError
from svc.evaluation.finding import FindingKind
from svc.invocation import print_json
from svc.terminal import counting, output
from trainer.evaluation.diagnosis.diagnose import diagnose
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData

USUAL = {"lora": 4e-3, "dora": 4e-3, "full": 1e-3}
"""Learning rates that suit this model. At four times the rate the loss jumps; at a hundredth it stays flat."""
HELDOUT = 120
LONG = 16
ENDED = "ended"
"""Outcome of a run that the trainer stopped early."""


class Fault(StrEnum):
    """The fault injected into a training run."""

    RATE = "learning rate x 30"
    NAN = "learning rate 1e30"
    LABELS = "shuffled labels"
    STEPS = "too few steps"
    MEMORIZED = "memorization"


EXPECTED: dict[Fault, set[str]] = {
    Fault.RATE: {ENDED, FindingKind.DIVERGENCE, FindingKind.LEARNING_RATE_HIGH},
    Fault.NAN: {ENDED, FindingKind.DIVERGENCE, FindingKind.LEARNING_RATE_HIGH},
    Fault.LABELS: {FindingKind.LABEL_NOISE},
    Fault.STEPS: {FindingKind.UNDERFITTING, FindingKind.LEARNING_RATE_LOW},
    Fault.MEMORIZED: {FindingKind.OVERFITTING, FindingKind.TOO_LITTLE_DATA},
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Parameters of one training run.

    Attributes:
        long: maximum number of letters appended to a word; the actual number is random.
        confounded: whether word length depends on the letter: words of the first half of the alphabet, which
            the base knows, are long, and all other words are short.
        hard: share of words without a color.
        wrong: share of wrong labels.
    """

    seed: int
    method: str
    examples: int
    long: int
    confounded: bool
    hard: float
    wrong: float
    batch: int
    rate: float
    steps: int
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Diagnosis of one training run.

    Attributes:
        found: kinds of the findings, or `ENDED`.
        why: messages of the findings, or the error that stopped the run.
    """

    plan: Plan
    found: tuple[str, ...]
    why: str


def plan(seed: int, fault: Fault | None = None) -> Plan:
    """Return the plan of a seed's healthy run, with one change if a fault is given."""
    draw = random.Random(seed)  # noqa: S311
    batch = draw.choice([4, 8, 16])
    steps = round(60 * 2 ** draw.uniform(0, 1.5))
    method = draw.choice(["lora", "lora", "lora", "dora", "full", "full"])
    healthy = Plan(
        seed=seed,
        method=method,
        examples=max(150, round(steps * batch / draw.uniform(1, 3))),
        long=draw.choice([0, 6, LONG]),
        confounded=draw.random() < 0.3,
        hard=draw.uniform(0, 0.2),
        wrong=draw.choice([0, 0, 0.02]),
        batch=batch,
        rate=USUAL[method] * 2 ** draw.uniform(-0.5, 0.5),
        steps=steps,
        fault=fault,
    )
    match fault:
        case Fault.RATE:
            return replace(healthy, rate=30 * healthy.rate)
        case Fault.NAN:
            return replace(healthy, rate=1e30)
        case Fault.STEPS:
            return replace(healthy, steps=24)
        case Fault.MEMORIZED:
            return replace(healthy, examples=60, batch=8, steps=150, hard=0.2)
        case _:
            return healthy


def train_base(folder: Path) -> Path:
    """Train a base that answers each letter with a color, whatever the question's length. Return its folder."""
    from tests.trainer.conftest import make_model, make_recipe
    from tests.trainer.evaluation.diagnosis.letter_task import colors, questions

    start = make_model(folder / "random", hidden_size=128, intermediate_size=256, num_attention_heads=4)
    recipe = make_recipe(
        method="full", train={"batch_size": 32, "learning_rate": 3e-3, "steps": 1000}, stopping={"curve": False}
    )
    draw = random.Random(0)  # noqa: S311
    data = [_longer(example, draw.choice([0, 6, LONG]), draw) for example in questions(4000, 0, colors(0), hard=0.1)]
    train_model(
        start, TrainingData(data), recipe, folder / "base", folder / "checkpoints", number_type=NumberType.FLOAT32
    )
    return folder / "base"


def data_of(run_plan: Plan) -> tuple[list[ChatExample], list[ChatExample]]:
    """Return a plan's training and held-out examples, in which most of the base's colors are renamed."""
    from tests.trainer.evaluation.diagnosis.letter_task import COLORS, colors, mislabel, questions

    draw, of = random.Random(run_plan.seed), colors(0)  # noqa: S311
    renamed = dict(zip(COLORS, COLORS[1:] + COLORS[:1], strict=True))
    known = {letter for letter in of if letter < "n"} if run_plan.confounded else set()
    of = {letter: color if letter in known else renamed[color] for letter, color in of.items()}
    drawn = mislabel(
        questions(run_plan.examples + HELDOUT, run_plan.seed, of, hard=run_plan.hard), run_plan.wrong, run_plan.seed
    )
    examples = [
        _longer(
            example, run_plan.long if not run_plan.confounded else (LONG if example.question[0] in known else 0), draw
        )
        for example in drawn
    ]
    if run_plan.fault is Fault.LABELS:
        answers = draw.sample([example.answer for example in examples], len(examples))
        examples = [_example(example.question, answer) for example, answer in zip(examples, answers, strict=True)]
    return examples[HELDOUT:], examples[:HELDOUT]


def _longer(example: ChatExample, max_letters: int, draw: random.Random) -> ChatExample:
    added = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(0, max_letters)))
    return _example(added + example.question, example.answer)


def _example(word: str, answer: str) -> ChatExample:
    return ChatExample((Message(Role.USER, word), Message(Role.ASSISTANT, answer)))


def play(base: Path, run_plan: Plan) -> Outcome:
    """Train and diagnose one run in the current process."""
    import torch

    from tests.trainer.evaluation.diagnosis.judged_run import train_and_judge

    torch.set_num_threads(1)
    train, heldout = data_of(run_plan)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = train_and_judge(
                base,
                Path(folder),
                train,
                heldout,
                usual_learning_rate=USUAL[run_plan.method],
                method=run_plan.method,
                train={
                    "batch_size": run_plan.batch,
                    "learning_rate": run_plan.rate,
                    "steps": run_plan.steps,
                    "seed": run_plan.seed,
                },
            )
        except TrainingError as error:
            return Outcome(run_plan, (ENDED,), str(error.wrong))
    findings = diagnose(run)
    return Outcome(
        run_plan, tuple(finding.kind for finding in findings), "; ".join(finding.what for finding in findings)
    )


@click.command()
@click.option("--healthy", type=click.IntRange(1), default=150, show_default=True, help="Number of healthy runs.")
@click.option("--faulty", type=click.IntRange(0), default=10, show_default=True, help="Number of runs per fault.")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="Seed of the first run.")
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True, help="Number of concurrent runs.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(healthy: int, faulty: int, first: int, processes: int, as_json: bool) -> None:
    """Measure the diagnosis accuracy on real training runs of a tiny model."""
    plans = [plan(seed) for seed in range(first, first + healthy)]
    plans += [plan(seed, fault) for fault in Fault for seed in range(first, first + faulty)]
    outcomes = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        counting("trainings", len(plans)) as advance,
    ):
        base = pool.submit(train_base, Path(folder)).result()
        for outcome in pool.map(partial(play, base), plans):
            outcomes.append(outcome)
            advance()
    if as_json:
        print_json([asdict(outcome) for outcome in outcomes])
        return
    wrong = [outcome for outcome in outcomes if outcome.plan.fault is None and outcome.found]
    output.print(f"healthy runs that were stopped or have findings: {len(wrong)} of {healthy}")
    for outcome in wrong:
        output.print(f"  seed {outcome.plan.seed}: {', '.join(outcome.found)}: {outcome.why}")
    for fault in Fault:
        of_fault = [outcome for outcome in outcomes if outcome.plan.fault is fault]
        right = sum(not EXPECTED[fault].isdisjoint(outcome.found) for outcome in of_fault)
        kinds = Counter(", ".join(outcome.found) or "nothing" for outcome in of_fault)
        output.print(f"{fault}: found in {right} of {len(of_fault)} {dict(kinds)}")


if __name__ == "__main__":
    main()
