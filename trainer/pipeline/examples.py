"""The examples of a run: what is trained on, and what the version is judged by."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from svc.dataset.checks.check import shared_prompts
from svc.dataset.fingerprint import fingerprint
from svc.dataset.prompt_hashes import NO_PROMPTS, PromptHashes, hash_prompts
from svc.dataset.readers.bad_lines import BadLines
from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.dataset.split import mix_general, near_leaks, put_sample_first, split_heldout
from svc.errors import DataError
from svc.evaluation.general.general_set import GeneralSet, read_general_set, shipped_general_set
from svc.terminal import console
from trainer.recipe.sections import Data, Evaluate, Recipe

_MANY_HELD = 2.0
"""Times the share that was asked for, from which on it is told."""
_FEW = 20
"""Examples that chance may hold out beyond it."""


@dataclass(frozen=True, slots=True)
class Examples:
    """What is trained on and judged by, and their fingerprints.

    Attributes:
        train: the task's examples, then the general ones.
        heldout: those that are asked come first.
        given: the task's examples as the files have them, before any was held out or left out.
        general: how many of `train`, at its end, are general.
        questions: general ones, which none of `train` is; None where none are asked.
    """

    train: tuple[ChatExample, ...]
    heldout: tuple[ChatExample, ...]
    train_fingerprint: str
    heldout_fingerprint: str
    given: tuple[ChatExample, ...]
    general: int = 0
    questions: GeneralSet | None = None


def read_run_examples(
    recipe: Recipe,
    *,
    cache: Path | None = None,
    bad_lines: BadLines | None = None,
    learnt: PromptHashes = NO_PROMPTS,
) -> Examples:
    """Reads a recipe's data.

    Args:
        cache: folder for datasets of the hub.
        bad_lines: takes lines that cannot be trained on, leaks among them; without it the first one stops the run.
        learnt: prompts that earlier versions of the recipe's name were trained on.

    Raises:
        DataError: a file that cannot be trained on; names file and line.
    """
    data = recipe.data
    read = partial(read_examples, cache=cache, bad_lines=bad_lines)
    heldout = read(data.heldout) if data.heldout else []
    readable = read(data.train, minimum=2 if heldout else 3, kept_back=heldout if bad_lines else ())
    given = (*readable, *heldout)
    if heldout:
        _tell_learnt(recipe.name, heldout, learnt)
    else:
        readable, heldout = _split(recipe, readable, learnt)
    if recipe.evaluate.limit:
        heldout = put_sample_first(heldout, recipe.evaluate.limit, data.seed)
    train = readable[data.skip :][: data.limit]
    if len(train) < 2:
        raise DataError(
            f"data.skip {data.skip} leaves {len(train)} of {len(readable)} examples in {', '.join(data.train)}",
            expected="at least 2",
            todo="lower data.skip",
        )
    _refuse_leaks(data, train, heldout)
    questions = _questions(recipe.evaluate)
    train = _leave_out(train, questions)
    kept_back = (*heldout, *(questions.examples if questions else ()))
    general = mix_general(train, read(data.general), kept_back, data.general_share, data.seed) if data.general else []
    whole = (*train, *general)
    prints = fingerprint(whole), fingerprint(heldout)
    return Examples(whole, tuple(heldout), *prints, given, len(general), questions)


def _questions(evaluate: Evaluate) -> GeneralSet | None:
    """The general questions that a recipe asks."""
    if evaluate.general is False:
        return None
    whole = shipped_general_set() if evaluate.general is True else read_general_set(evaluate.general)
    return whole.first(evaluate.general_limit)


def _leave_out(train: list[ChatExample], questions: GeneralSet | None) -> list[ChatExample]:
    """The training examples but those that ask a general question; says how many.

    Raises:
        DataError: fewer than two are left.
    """
    asked = set(shared_prompts(train, questions.examples)) if questions else set()
    if not asked:
        return train
    console.print(
        f"[yellow]{len(asked)} training examples are left out: they are among the general questions "
        "(evaluate.general), which are never trained on[/yellow]"
    )
    if len(train) - len(asked) < 2:
        raise DataError(
            f"all but {len(train) - len(asked)} of {len(train)} training examples are general questions",
            expected="at least 2 others",
            todo="set evaluate.general to false, or to a file with other questions",
        )
    return [example for place, example in enumerate(train) if place not in asked]


def _split(
    recipe: Recipe, examples: list[ChatExample], learnt: PromptHashes
) -> tuple[list[ChatExample], list[ChatExample]]:
    """Examples to train on, and to hold out; those that are not held out since they were learnt before are told."""
    share, count = recipe.data.heldout_share, len(examples)
    split = split_heldout(examples, share, recipe.data.seed, learnt)
    if len(split.heldout) > max(_MANY_HELD * share * count, share * count + _FEW):
        console.print(
            f"[yellow]{len(split.heldout)} of {count} examples are held out at data.heldout_share {share:g}: near "
            "duplicates stay together. Lower it, or drop near duplicates[/yellow]"
        )
    if split.learnt_before:
        console.print(
            f"[yellow]{split.learnt_before} examples are trained on that would be held out: an earlier version of "
            f"{recipe.name} has learnt them, or nearly the same. {len(split.heldout)} are held out[/yellow]"
        )
    return split.train, split.heldout


def _tell_learnt(name: str, heldout: list[ChatExample], learnt: PromptHashes) -> None:
    """A held-out file stays as it is: whoever wrote it may want to ask just these."""
    if count := int(np.isin(hash_prompts(heldout), learnt).sum()):
        console.print(
            f"[yellow]{count} of {len(heldout)} held-out prompts were learnt by an earlier version of {name}: "
            "its figures, and those of a version that continues it, are too good on them[/yellow]"
        )


def _refuse_leaks(data: Data, train: list[ChatExample], heldout: list[ChatExample]) -> None:
    """Examples that are held out stop a run; examples that are nearly held out are told."""
    check = f"svc data check {' '.join(data.train)} --heldout {' '.join(data.heldout or ())}"
    leaked = shared_prompts(train, heldout)
    if leaked:
        raise DataError(
            f"{len(leaked)} training examples have the prompt of a held-out one, the first is number {leaked[0] + 1}",
            expected="a held-out set that is never trained on: else its figures mean nothing",
            todo=f"{check}, and drop those lines; or train with --skip-bad",
        )
    if data.heldout and (near := near_leaks(train, heldout)):
        console.print(f"[yellow]{len(near)} training examples ask nearly the same as a held-out one: {check}[/yellow]")
