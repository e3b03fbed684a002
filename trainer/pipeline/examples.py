"""The examples of a run: those for training and those for evaluation."""

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
"""Multiple of `data.heldout_share` above which a warning is printed."""
_FEW = 20
"""Examples that chance may hold out beyond the share."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples for training and for evaluation, with their fingerprints.

    Attributes:
        train: the task's examples, then the general ones.
        heldout: held-out examples; those that are asked come first.
        given: the task's examples in the files, before any was held out or left out.
        general: number of general examples at the end of `train`.
        questions: general questions, of which `train` contains none; None if none are asked.
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
    """Load a recipe's data.

    Args:
        cache: folder for datasets of the hub.
        bad_lines: collects lines that cannot be trained on, including leaks; without it, the first such line raises.
        learnt: prompts that earlier versions of the recipe's name were trained on.

    Raises:
        DataError: a file cannot be trained on; names file and line.
    """
    data = recipe.data
    read = partial(read_examples, cache=cache, bad_lines=bad_lines)
    heldout = read(data.heldout) if data.heldout else []
    readable = read(data.train, minimum=2 if heldout else 3, kept_back=heldout if bad_lines else ())
    given = (*readable, *heldout)
    if heldout:
        _warn_learnt(recipe.name, heldout, learnt)
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
    mixed = (*train, *general)
    prints = fingerprint(mixed), fingerprint(heldout)
    return Examples(mixed, tuple(heldout), *prints, given, len(general), questions)


def _questions(evaluate: Evaluate) -> GeneralSet | None:
    """Return the general questions that a recipe asks."""
    if evaluate.general is False:
        return None
    questions = shipped_general_set() if evaluate.general is True else read_general_set(evaluate.general)
    return questions.first(evaluate.general_limit)


def _leave_out(train: list[ChatExample], questions: GeneralSet | None) -> list[ChatExample]:
    """Return the training examples without those that ask a general question; print the number left out.

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
    return [example for index, example in enumerate(train) if index not in asked]


def _split(
    recipe: Recipe, examples: list[ChatExample], learnt: PromptHashes
) -> tuple[list[ChatExample], list[ChatExample]]:
    """Return the examples to train on and those to hold out; warn about examples that earlier versions learnt."""
    share, count = recipe.data.heldout_share, len(examples)
    split = split_heldout(examples, share, recipe.data.seed, learnt)
    if len(split.heldout) > max(_MANY_HELD * share * count, share * count + _FEW):
        console.print(
            f"[yellow]{len(split.heldout)} of {count} examples are held out, more than data.heldout_share {share:g}, "
            "because near duplicates stay together. Lower the share, or drop near duplicates[/yellow]"
        )
    if split.learnt_before:
        console.print(
            f"[yellow]{split.learnt_before} examples are trained on instead of held out: an earlier version of "
            f"{recipe.name} has learnt them, or nearly the same. {len(split.heldout)} are held out[/yellow]"
        )
    return split.train, split.heldout


def _warn_learnt(name: str, heldout: list[ChatExample], learnt: PromptHashes) -> None:
    """Warn about learnt prompts in a held-out file; the file is used unchanged, its author may want these prompts."""
    if count := int(np.isin(hash_prompts(heldout), learnt).sum()):
        console.print(
            f"[yellow]{count} of {len(heldout)} held-out prompts were learnt by an earlier version of {name}: "
            "its figures, and those of a version that continues it, are too good on them[/yellow]"
        )


def _refuse_leaks(data: Data, train: list[ChatExample], heldout: list[ChatExample]) -> None:
    """Raise if a training example is held out too; warn if one is nearly the same as a held-out example."""
    check = f"svc data check {' '.join(data.train)} --heldout {' '.join(data.heldout or ())}"
    leaked = shared_prompts(train, heldout)
    if leaked:
        raise DataError(
            f"{len(leaked)} training examples have the prompt of a held-out example; the first is number "
            f"{leaked[0] + 1}",
            expected="held-out examples that are never trained on, because figures on trained ones mean nothing",
            todo=f"{check}, and drop those lines; or train with --skip-bad",
        )
    if data.heldout and (near := near_leaks(train, heldout)):
        console.print(f"[yellow]{len(near)} training prompts are nearly the same as held-out ones: {check}[/yellow]")
