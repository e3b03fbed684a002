"""Loads the training and evaluation examples of a run."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from svc.dataset.checks.check import shared_prompts
from svc.dataset.prompt_hashes import NO_PROMPTS, PromptHashes, hash_prompts
from svc.dataset.readers.bad_lines import BadLines
from svc.dataset.readers.preferences import read_labeled, read_pairs
from svc.dataset.readers.reader import read_examples
from svc.dataset.readers.source import newest_modification
from svc.dataset.schema.example import ChatExample, normal_prompt
from svc.dataset.schema.objective import Objective
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from svc.dataset.stored_examples import StoredExamples, as_tuple, collect, join, select
from svc.errors import DataError
from svc.evaluation.general.general_set import GeneralSet, read_general_set, shipped_general_set
from svc.registry.manifest import SelectedBy
from svc.terminal import console
from trainer.data.fingerprint import fingerprint
from trainer.data.split import mix_general, near_leaks, put_sample_first, split_heldout
from trainer.recipe.data import Learn
from trainer.recipe.evaluate import Evaluate
from trainer.recipe.recipe import Recipe

Preference = PreferencePair | LabeledAnswer
"""Examples from which a preference is learned."""

_MANY_HELD = 2.0
"""A warning is printed if the share of held-out examples exceeds this multiple of `data.heldout_share`."""
_FEW = 20
"""If the number of held-out examples exceeds the expected number by at most this many, no warning is printed, because
the excess may be due to chance."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples for training and for evaluation, with their fingerprints.

    Attributes:
        train: the task's examples, followed by the general examples.
        heldout: held-out examples, starting with the examples that are used in the evaluation.
        given: the task's examples as read from the files, before any were held out or excluded.
        general: number of general examples at the end of `train`.
        questions: general questions, none of which occur in `train`, or None if there are none.
        validation: examples read from `data.validation`.
        selected_by: the examples that were used to select the version's weights or the recipe's values.
        modified_at: time at which the newest local file of `data.train` was last modified, or None without local files.
        preferences: pairs or labeled answers to train on; empty unless the recipe has a preference objective. With such
            an objective, `train` contains the better or the labeled answers, in the same order.
        heldout_preferences, validation_preferences: held-out and validation pairs or labeled answers. `heldout`
            contains only the better or desirable answers, which are the references in the evaluation.
    """

    train: Sequence[ChatExample]
    heldout: Sequence[ChatExample]
    train_fingerprint: str
    heldout_fingerprint: str
    given: Sequence[ChatExample]
    general: int = 0
    questions: GeneralSet | None = None
    validation: Sequence[ChatExample] = ()
    selected_by: SelectedBy = SelectedBy.NONE
    modified_at: datetime | None = field(default=None, compare=False)
    preferences: tuple[Preference, ...] = ()
    heldout_preferences: tuple[Preference, ...] = ()
    validation_preferences: tuple[Preference, ...] = ()

    @property
    def measured(self) -> Sequence[ChatExample]:
        """Examples on which loss is measured during training and in sweeps: the validation examples if there are any,
        or else the held-out examples.
        """
        return self.validation or self.heldout

    @property
    def measured_fingerprint(self) -> str:
        """Fingerprint of the examples in `measured`, or in `measured_preferences` for a preference objective."""
        if self.preferences:
            return fingerprint_preferences(self.measured_preferences)
        return fingerprint(self.validation) if self.validation else self.heldout_fingerprint

    @property
    def measured_preferences(self) -> tuple[Preference, ...]:
        """The preference pairs or labeled answers that belong to the examples in `measured`."""
        return self.validation_preferences or self.heldout_preferences

    @property
    def pairs(self) -> tuple[PreferencePair, ...]:
        """Held-out pairs, in the order of `heldout`. A desirable and an undesirable labeled answer to the same prompt
        form a pair.
        """
        pairs = [pair for pair in self.heldout_preferences if isinstance(pair, PreferencePair)]
        labeled = [answer for answer in self.heldout_preferences if isinstance(answer, LabeledAnswer)]
        rejected = {normal_prompt(answer.example): answer.example for answer in labeled if not answer.desirable}
        better = [example for example in self.heldout if normal_prompt(example) in rejected]
        return (*pairs, *(PreferencePair(example, rejected[normal_prompt(example)]) for example in better))

    @property
    def selected(self) -> "Examples":
        """A copy of these examples that states that those in `measured` were used to select the version."""
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
        bad_lines: collects lines that cannot be trained on, including lines that repeat a held-out or validation
            prompt. If None, the first such line raises an error.
        learnt: hashes of the prompts on which earlier versions with the recipe's name were trained.

    Raises:
        DataError: a line cannot be trained on; the message names the file and line.
    """
    data = recipe.data
    if not data.train:
        return _read_heldout(recipe, cache)
    read = partial(_read, recipe, cache=cache, bad_lines=bad_lines)
    heldout: Sequence[ChatExample] = read(data.heldout) if data.heldout else ()
    validation = read(data.validation, kept_back=heldout if bad_lines else ()) if data.validation else ()
    kept_back = (*heldout, *validation) if bad_lines else ()
    readable = read(data.train, minimum=2 if heldout else 3, kept_back=kept_back)
    given = _references(recipe, join(readable, heldout, validation))
    if heldout:
        _warn_learnt(recipe.name, heldout, learnt)
    else:
        readable, heldout = _split(recipe, readable, learnt)
    all_heldout, heldout = heldout, _references(recipe, heldout)
    if not heldout:
        raise DataError(
            "no held-out answer is labeled desirable",
            expected="at least one desirable answer, because the evaluation compares only with desirable answers",
            todo="set data.heldout to a file with desirable answers, or raise data.heldout_share",
        )
    if recipe.evaluate.limit:
        heldout = put_sample_first(heldout, recipe.evaluate.limit, data.seed)
    train = readable[data.skip :][: data.limit]
    if len(train) < 2:
        raise DataError(
            f"data.skip: {data.skip} leaves only {len(train)} of {len(readable)} examples in {', '.join(data.train)}",
            expected="at least 2",
            todo="lower data.skip",
        )
    from_training_files = train if data.heldout else join(train, all_heldout)
    parts = [
        _Part("training", data.train, from_training_files),
        _Part("validation", data.validation or (), validation),
        _Part("held-out", data.heldout or (), all_heldout),
    ]
    for part, other in combinations([part for part in parts if part.files], 2):
        _refuse_leaks(part, other)
    questions = _questions(recipe.evaluate)
    train = _leave_out(train, questions)
    untrained = (*all_heldout, *validation, *(questions.examples if questions else ()))
    general = mix_general(train, read(data.general), untrained, data.general_share, data.seed) if data.general else ()
    mixed = join(train, general)
    preferences = _preferences(mixed)
    if data.learn is Learn.ALL and not preferences:
        mixed = collect(example.learning_all for example in mixed)
    prints = fingerprint_preferences(preferences) if preferences else fingerprint(mixed), fingerprint(heldout)
    examples = Examples(
        _plain(mixed),
        _plain(heldout),
        *prints,
        _plain(given),
        len(general),
        questions,
        _plain(validation),
        modified_at=newest_modification(data.train),
        preferences=preferences,
        heldout_preferences=_preferences(join(heldout, [each for each in all_heldout if not _is_reference(each)])),
        validation_preferences=_preferences(validation),
    )
    return examples.selected if recipe.stopping.selects else examples


def _read_heldout(recipe: Recipe, cache: Path | None) -> Examples:
    """Load the held-out examples of a recipe that names no training data. Later traffic is compared with these
    examples.
    """
    heldout = read_examples(recipe.data.heldout or (), minimum=2, cache=cache)
    if recipe.evaluate.limit:
        heldout = put_sample_first(heldout, recipe.evaluate.limit, recipe.data.seed)
    prints, questions = (fingerprint(()), fingerprint(heldout)), _questions(recipe.evaluate)
    modified_at = newest_modification(recipe.data.heldout or ())
    heldout = as_tuple(heldout)
    return Examples((), heldout, *prints, heldout, questions=questions, modified_at=modified_at)


@dataclass(frozen=True, slots=True)
class _PreferenceExample(ChatExample):
    """An example that carries the pair or labeled answer from which it was read. It contains the better or the labeled
    answer, so that examples are selected in the same way for all objectives.
    """

    preference: Preference = field(kw_only=True)


def _read(
    recipe: Recipe,
    sources: Sequence[str],
    *,
    cache: Path | None,
    bad_lines: BadLines | None,
    minimum: int = 1,
    kept_back: Sequence[ChatExample] = (),
) -> Sequence[ChatExample]:
    """Return the examples of the given sources. For a preference objective, they are preferences."""
    if not recipe.objective.is_preference:
        examples = read_examples(sources, minimum=minimum, cache=cache, bad_lines=bad_lines, kept_back=kept_back)
        _check_documents(sources, examples, wanted=recipe.objective is Objective.TEXT)
        return examples
    read = read_labeled if recipe.objective is Objective.KTO else read_pairs
    answers: Sequence[Preference] = read(
        sources, minimum=minimum, cache=cache, bad_lines=bad_lines, kept_back=kept_back
    )
    return [
        _PreferenceExample(example_of(answer).messages, example_of(answer).tools, preference=answer)
        for answer in answers
    ]


def _is_reference(example: ChatExample) -> bool:
    """Return whether an example's answer is a reference answer. Answers labeled as undesirable are not."""
    preference = example.preference if isinstance(example, _PreferenceExample) else None
    return not isinstance(preference, LabeledAnswer) or preference.desirable


def _references(recipe: Recipe, examples: Sequence[ChatExample]) -> Sequence[ChatExample]:
    """Return the examples without those whose answers are labeled as undesirable."""
    return list(filter(_is_reference, examples)) if recipe.objective is Objective.KTO else examples


def _preferences(examples: Sequence[ChatExample]) -> tuple[Preference, ...]:
    """Return the pairs or labeled answers that examples carry. Examples on disk carry none."""
    if isinstance(examples, StoredExamples):
        return ()
    return tuple(example.preference for example in examples if isinstance(example, _PreferenceExample))


def _plain(examples: Sequence[ChatExample]) -> Sequence[ChatExample]:
    """Return the examples as a tuple or on disk, without the pairs or labeled answers that they carry."""
    if examples and isinstance(examples[0], _PreferenceExample):
        return tuple(map(example_of, _preferences(examples)))
    return as_tuple(examples)


def _check_documents(sources: Sequence[str], examples: Sequence[ChatExample], *, wanted: bool) -> None:
    """Raise DataError if any example is a document where chats are required, or a chat where documents are required."""
    for number, example in enumerate(examples, start=1):
        if example.is_document is not wanted:
            raise DataError(
                f"example {number} of {', '.join(sources)} is {'a chat' if wanted else 'a document without turns'}",
                expected="documents, because of `objective: text`" if wanted else "chats",
                todo="remove `objective: text` from the recipe" if wanted else "set `objective: text` in the recipe",
            )


def example_of(answer: Preference) -> ChatExample:
    """Return the chat example with a pair's better answer, or the chat example that a labeled answer contains."""
    return answer.chosen if isinstance(answer, PreferencePair) else answer.example


def fingerprint_preferences(preferences: Sequence[Preference]) -> str:
    """Return the SHA-256 hash of pairs or labeled answers, in order, as `sha256:<hex>`."""
    digest = hashlib.sha256()
    for answer in preferences:
        other = answer.rejected.as_dict() if isinstance(answer, PreferencePair) else answer.desirable
        content = json.dumps([example_of(answer).as_dict(), other], ensure_ascii=False, sort_keys=True)
        digest.update(content.encode("utf-8") + b"\n")
    return f"sha256:{digest.hexdigest()}"


def _questions(evaluate: Evaluate) -> GeneralSet | None:
    """Return the general questions that measure forgetting, or None if the recipe turns them off."""
    if evaluate.general is False:
        return None
    questions = shipped_general_set() if evaluate.general is True else read_general_set(evaluate.general)
    return questions.first(evaluate.general_limit)


def _leave_out(train: Sequence[ChatExample], questions: GeneralSet | None) -> Sequence[ChatExample]:
    """Exclude training examples whose prompts are also general questions, and print how many were excluded. Return the
    other examples.

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
            todo="set evaluate.general to false, or to a file of questions that are not in the training data",
        )
    return select(train, [index for index in range(len(train)) if index not in asked])


def _split(
    recipe: Recipe, examples: Sequence[ChatExample], learnt: PromptHashes
) -> tuple[Sequence[ChatExample], Sequence[ChatExample]]:
    """Split the examples into training and held-out examples, and print a warning if the split deviates from the
    recipe.
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


def _warn_learnt(name: str, heldout: Sequence[ChatExample], learnt: PromptHashes) -> None:
    """Warn if earlier versions were trained on prompts in a held-out file. The file is used unchanged, because
    its author may have included these prompts on purpose.
    """
    if count := int(np.isin(hash_prompts(heldout), learnt).sum()):
        console.print(
            f"[yellow]an earlier version of {name} was trained on {count} of {len(heldout)} held-out prompts: "
            "evaluations of that version, and of versions based on it, are too optimistic[/yellow]"
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """Examples used for one purpose, and the files from which the recipe reads them."""

    purpose: str
    files: Sequence[str]
    examples: Sequence[ChatExample]


def _refuse_leaks(part: _Part, other: _Part) -> None:
    """Raise DataError if the examples for two purposes, such as training and evaluation, share a prompt. If
    prompts are only near duplicates, print a warning.
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
