"""Diagnoses training runs of a real base model on real text: one usual run, and three with one fault each.

Each run uses this project's trainer and the first examples from a folder with `train.jsonl` and
`heldout.jsonl`. Answers are generated with transformers instead of the engine. A run takes minutes on a
CPU, so there is only one run of each kind: the figures are examples, not rates.
"""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType, read_capabilities
from svc.errors import TrainingError
from svc.invocation import print_json
from svc.settings.load import load_settings
from svc.terminal import output
from trainer.evaluation.diagnosis.diagnose import diagnose

TASK = Path(__file__).parents[1] / "examples" / "debian-triage"
ENDED = "ended"
"""Outcome of a run that the trainer stopped early."""


class Kind(StrEnum):
    """How a run differs from the method's defaults."""

    HEALTHY = "healthy"
    RATE = "learning rate x 30"
    ANSWERS = "shuffled answers"
    STEPS = "too few steps"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Diagnosis of one training run.

    Attributes:
        found: kinds of the findings, or `ENDED`.
        why: messages of the findings, or the error that stopped the run.
        exact_match: exact-match score, or None for a run that the trainer stopped.
    """

    kind: Kind
    found: tuple[str, ...]
    why: str
    seconds: float
    exact_match: float | None = None
    heldout_loss: float | None = None


def shuffled(examples: Sequence[ChatExample], seed: int) -> list[ChatExample]:
    """Return the same questions with their answers shuffled."""
    answers = random.Random(seed).sample([example.messages[-1] for example in examples], len(examples))  # noqa: S311
    return [ChatExample((*example.messages[:-1], answer)) for example, answer in zip(examples, answers, strict=True)]


def judge_run(
    kind: Kind,
    base: Path,
    train: Sequence[ChatExample],
    heldout: Sequence[ChatExample],
    number_type: NumberType,
    *,
    few: int,
    max_tokens: int,
    **settings: Any,
) -> Outcome:
    """Train and diagnose one run in the current process."""
    from tests.trainer.conftest import make_recipe
    from tests.trainer.evaluation.diagnosis.judged_run import train_and_judge
    from trainer.model.config import read_width

    match kind:
        case Kind.RATE:
            settings |= {"learning_rate": 30 * make_recipe(train=settings).learning_rate(read_width(base))}
        case Kind.STEPS:
            settings |= {"steps": few}
        case Kind.ANSWERS:
            seed = settings["seed"]
            train, heldout = shuffled(train, seed), shuffled(heldout, seed)
    began = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = train_and_judge(
                base, Path(folder), train, heldout, number_type=number_type, max_tokens=max_tokens, train=settings
            )
        except TrainingError as error:
            return Outcome(kind, (ENDED,), str(error.wrong), perf_counter() - began)
    findings, report = diagnose(run), run.evaluation
    assert report is not None
    return Outcome(
        kind,
        tuple(finding.kind for finding in findings),
        "; ".join(finding.what for finding in findings),
        perf_counter() - began,
        report.exact_match.value,
        report.nll.value,
    )


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), default=TASK, show_default=True)
@click.option("--base", default="smollm2-135m-instruct", show_default=True, help="Base model, as in a recipe.")
@click.option("--kind", "kinds", type=click.Choice(list(Kind), case_sensitive=False), multiple=True, default=list(Kind))
@click.option("--examples", type=click.IntRange(1), default=320, show_default=True, help="Number of training examples.")
@click.option(
    "--heldout", "asked", type=click.IntRange(1), default=100, show_default=True, help="Number of held-out examples."
)
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True, help="Number of examples per step.")
@click.option(
    "--few", type=click.IntRange(1), default=24, show_default=True, help="Number of steps of the run that has too few."
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=10, show_default=True, help="Maximum number of tokens per answer."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(
    data: Path,
    base: str,
    kinds: Sequence[Kind],
    examples: int,
    asked: int,
    batch: int,
    few: int,
    max_tokens: int,
    seed: int,
    as_json: bool,
) -> None:
    """Diagnose training runs of a real base model on real text."""
    from trainer.base_model.resolve import resolve_base

    settings = load_settings()
    number_type = read_capabilities(settings.home).training_type
    folder = resolve_base(base, settings.base_cache).folder
    train, heldout = read_examples(data / "train.jsonl")[:examples], read_examples(data / "heldout.jsonl")[:asked]
    outcomes = []
    for kind in kinds:
        outcome = judge_run(
            kind, folder, train, heldout, number_type, few=few, max_tokens=max_tokens, batch_size=batch, seed=seed
        )
        outcomes.append(outcome)
        if not as_json:
            figures = (
                ""
                if outcome.exact_match is None
                else f", exact match {outcome.exact_match:.2f}, held-out loss {outcome.heldout_loss:.3f}"
            )
            output.print(f"{kind}: {', '.join(outcome.found) or 'nothing'} ({outcome.seconds:.0f} s{figures})")
            output.print(f"  {outcome.why}")
    if as_json:
        print_json([asdict(outcome) for outcome in outcomes])


if __name__ == "__main__":
    main()
