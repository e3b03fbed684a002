"""Collects the measurements that are needed to diagnose a run."""

from collections.abc import Mapping, Sequence

import numpy as np

from svc.dataset.checks.line_table import first_with_same
from svc.dataset.prompt_hashes import hash_text
from svc.dataset.schema.example import ChatExample, normal_prompt
from svc.evaluation.finding import Finding
from svc.evaluation.intervals import Interval
from svc.version import Format
from trainer.evaluation.diagnosis.diagnose import diagnose
from trainer.evaluation.diagnosis.training_run import TrainingRun
from trainer.evaluation.qualification import Qualified
from trainer.pipeline.examples import Examples
from trainer.recipe.recipe import Recipe
from trainer.training_curve import TrainingPoint


def diagnose_training(
    recipe: Recipe,
    examples: Examples,
    curve: Sequence[TrainingPoint],
    qualified: Mapping[Format, Qualified],
    general_change: Interval | None = None,
    *,
    width: int,
) -> tuple[Finding, ...]:
    """Return the findings on a training run.

    Args:
        curve: loss curve of the training run.
        qualified: results of the formats that are complete models. The merged format represents the trained model.
        general_change: score on general tasks after training minus the score before, or None if not
            measured.
        width: hidden width of the base.
    """
    merged = qualified.get(Format.MERGED)
    evaluated = examples.heldout[: len(merged.results)] if merged else examples.heldout
    return diagnose(
        TrainingRun(
            recipe=recipe,
            usual_learning_rate=recipe.usual_learning_rate(width),
            curve=curve,
            train_examples=len(examples.train),
            contradictions=0
            if examples.preferences
            else count_contradictions(examples.train),  # labeled answers differ
            learns_final_answers=not examples.preferences
            and all(example.learnt == (len(example.messages) - 1,) for example in examples.train),
            evaluation=merged.evaluation if merged else None,
            cut_off={format.value: served.evaluation.cut_off for format, served in qualified.items()},
            results=merged.results if merged else (),
            answers=[example.answer for example in evaluated],
            general_change=general_change,
        )
    )


def count_contradictions(examples: Sequence[ChatExample]) -> int:
    """Return the number of examples whose prompt and tools also occur in an example with a different answer."""
    texts = ("\x1e".join((normal_prompt(example), *example.tools)) for example in examples)
    keys = np.fromiter(map(hash_text, texts), np.uint64)
    answers = np.fromiter((hash_text(example.answer.strip()) for example in examples), np.uint64)
    differing = keys[answers != answers[first_with_same(keys)]]
    return int(np.isin(keys, differing).sum())
