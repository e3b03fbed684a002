"""Loads the training and evaluation examples of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np

from svc.dataset.checks.check import shared_prompts
from svc.dataset.fingerprint import fingerprint
from svc.dataset.prompt_hashes import NO_PROMPTS, PromptHashes, hash_prompts
from svc.dataset.readers.bad_lines import BadLines
from svc.dataset.readers.reader import read_examples
from svc.dataset.readers.source import newest_modification
from svc.dataset.schema.example import ChatExample
from svc.dataset.split import mix_general, near_leaks, put_sample_first, split_heldout
from svc.errors import DataError
from svc.evaluation.general.general_set import GeneralSet, read_general_set, shipped_general_set
from svc.registry.manifest import SelectedBy
from svc.terminal import console
from trainer.recipe.sections import Evaluate, Learn, Recipe

_MANY_HELD = 2.0
"""A warning is printed if the share of held-out examples exceeds this multiple of `data.heldout_share`."""
_FEW = 20
"""Number of extra held-out examples that may be due to chance, and cause no warning."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples for training and for evaluation, with their fingerprints.

    Attributes:
        train: the task's examples, followed by the general ones.
        heldout: held-out examples. Those used in the evaluation come first.
        given: the task's examples as read from the files, before any were held out or excluded.
        general: number of general examples at the end of `train`.
        questions: general questions, none of which occur in `train`, or None if none are asked.
        validation: examples read from `data.validation`.
        selected_by: the examples by which the version's weights or the recipe's values were selected.
        modified_at: time at which the newest local file of `data.train` was last modified, or None without local files.
    """

    train: tuple[ChatExample, ...]
    heldout: tuple[ChatExample, ...]
    train_fingerprint: str
    heldout_fingerprint: str
    given: tuple[ChatExample, ...]
    general: int = 0
    questions: GeneralSet | None = None
    validation: tuple[ChatExample, ...] = ()
    selected_by: SelectedBy = SelectedBy.NONE
    modified_at: datetime | None = field(default=None, compare=False)

    @property
    def measured(self) -> tuple[ChatExample, ...]:
        """Examples on which loss is measured during training and in sweeps: validation examples if there are any,
        or else held-out ones.
        """
        return self.validation or self.heldout

    @property
    def measured_fingerprint(self) -> str:
        """Fingerprint of the examples in `measured`."""
        return fingerprint(self.validation) if self.validation else self.heldout_fingerprint

    @property
    def selected(self) -> "Examples":
        """A copy of these examples for a version that was selected based on the `measured` examples."""
        return replace(self, selected_by=SelectedBy.VALIDATION if self.validation else SelectedBy.HELDOUT)


def read_run_examples(
    recipe: Recipe,
    *,
    cache: Path | None = None,
    bad_lines: BadLines | None = None,
    learnt: PromptHashes = NO_PROMPTS,
) -> Examples:
    """Load the examples that a recipe names.

    Args:
        cache: folder for Hub datasets.
        bad_lines: collects lines that cannot be trained on, including leaks. If None, the first such line
            raises an error.
        learnt: hashes of the prompts on which earlier versions with the recipe's name were trained.

    Raises:
        DataError: a line cannot be trained on; the message names the file and line.
    """
    data = recipe.data
    read = partial(read_examples, cache=cache, bad_lines=bad_lines)
    heldout = read(data.heldout) if data.heldout else []
    validation = read(data.validation, kept_back=heldout if bad_lines else ()) if data.validation else []
    kept_back = (*heldout, *validation) if bad_lines else ()
    readable = read(data.train, minimum=2 if heldout else 3, kept_back=kept_back)
    given = (*readable, *heldout, *validation)
    if heldout:
        _warn_learnt(recipe.name, heldout, learnt)
    else:
        readable, heldout = _split(recipe, readable, learnt)
    if recipe.evaluate.limit:
        heldout = put_sample_first(heldout, recipe.evaluate.limit, data.seed)
    train = readable[data.skip :][: data.limit]
    if len(train) < 2:
        raise DataError(
            f"data.skip: {data.skip} leaves only {len(train)} of {len(readable)} examples in {', '.join(data.train)}",
            expected="at least 2",
            todo="lower data.skip",
        )
    if data.heldout:
        _refuse_leaks(_Part("training", data.train, train), _Part("held-out", data.heldout, heldout))
    if data.validation:
        chosen_by = _Part("validation", data.validation, validation)
        from_training_files = train if data.heldout else [*train, *heldout]
        _refuse_leaks(_Part("training", data.train, from_training_files), chosen_by)
        if data.heldout:
            _refuse_leaks(chosen_by, _Part("held-out", data.heldout, heldout))
    questions = _questions(recipe.evaluate)
    train = _leave_out(train, questions)
    untrained = (*heldout, *validation, *(questions.examples if questions else ()))
    general = mix_general(train, read(data.general), untrained, data.general_share, data.seed) if data.general else []
    mixed = (*train, *general)
    if data.learn is Learn.ALL:
        mixed = tuple(example.learning_all for example in mixed)
    prints = fingerprint(mixed), fingerprint(heldout)
    examples = Examples(
        mixed,
        tuple(heldout),
        *prints,
        given,
        len(general),
        questions,
        tuple(validation),
        modified_at=newest_modification(data.train),
    )
    return examples.selected if recipe.stopping.selects else examples


def _questions(evaluate: Evaluate) -> GeneralSet | None:
    """Return the recipe's general questions, or None if there are none."""
    if evaluate.general is False:
        return None
    questions = shipped_general_set() if evaluate.general is True else read_general_set(evaluate.general)
    return questions.first(evaluate.general_limit)


def _leave_out(train: list[ChatExample], questions: GeneralSet | None) -> list[ChatExample]:
    """Exclude training examples that ask a general question, and print how many were excluded. Return the rest.

    Raises:
        DataError: fewer than two examples remain.
    """
    asked = set(shared_prompts(train, questions.examples)) if questions else set()
    if not asked:
        return train
    console.print(
        f"[yellow]{len(asked)} training examples are excluded because they are also general questions "
        "(evaluate.general), which are never used for training[/yellow]"
    )
    if len(train) - len(asked) < 2:
        raise DataError(
            f"only {len(train) - len(asked)} of {len(train)} training examples are not general questions",
            expected="at least 2 training examples that are not general questions",
            todo="set evaluate.general to false, or to a file with different questions",
        )
    return [example for index, example in enumerate(train) if index not in asked]


def _split(
    recipe: Recipe, examples: list[ChatExample], learnt: PromptHashes
) -> tuple[list[ChatExample], list[ChatExample]]:
    """Split the examples into those to train on and those to hold out, printing warnings where the split
    deviates from the recipe.
    """
    share, count = recipe.data.heldout_share, len(examples)
    split = split_heldout(examples, share, recipe.data.seed, learnt)
    if len(split.heldout) > max(_MANY_HELD * share * count, share * count + _FEW):
        console.print(
            f"[yellow]{len(split.heldout)} of {count} examples are held out, more than data.heldout_share: {share:g}, "
            "because near duplicates stay together. Lower the share, or drop near duplicates[/yellow]"
        )
    if split.learnt_before:
        console.print(
            f"[yellow]{split.learnt_before} examples are used for training instead of being held out: an earlier "
            f"version of {recipe.name} was trained on them or on near duplicates. {len(split.heldout)} examples are "
            "held out[/yellow]"
        )
    return split.train, split.heldout


def _warn_learnt(name: str, heldout: list[ChatExample], learnt: PromptHashes) -> None:
    """Warn if earlier versions were trained on prompts in a held-out file. The file is used unchanged, because
    its author may want these prompts.
    """
    if count := int(np.isin(hash_prompts(heldout), learnt).sum()):
        console.print(
            f"[yellow]an earlier version of {name} was trained on {count} of {len(heldout)} held-out prompts: "
            "its figures, and those of versions based on it, are too optimistic[/yellow]"
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """Examples used for one purpose, and the files from which the recipe reads them."""

    purpose: str
    files: Sequence[str]
    examples: Sequence[ChatExample]


def _refuse_leaks(part: _Part, other: _Part) -> None:
    """Raise DataError if the examples for two purposes, such as training and evaluation, share a prompt. Near
    copies only cause a warning.
    """
    check = f"svc data check {' '.join(part.files)} --heldout {' '.join(other.files)}"
    leaked = shared_prompts(part.examples, other.examples)
    if leaked:
        raise DataError(
            f"{len(leaked)} {part.purpose} examples have the same prompt as a {other.purpose} example; the first is "
            f"example {leaked[0] + 1}",
            expected=f"{other.purpose} examples whose prompts are not in the {part.purpose} data",
            todo=f"drop the lines listed by `{check}`, or train with --skip-bad",
        )
    if near := near_leaks(part.examples, other.examples):
        console.print(
            f"[yellow]{len(near)} {part.purpose} prompts are near duplicates of {other.purpose} prompts: see "
            f"{check}[/yellow]"
        )
