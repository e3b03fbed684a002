"""Selects held-out examples, and general examples to mix in. The selection depends only on content and
seed, so it is the same wherever the files are and in whatever order they are read.

Near duplicates stay on one side, because a held-out example that nearly repeats a training example
measures memory. So do the examples of one conversation, whose turns are answers in one example and
context in another. Each group is assigned by its own hash, so that added data leave the existing
examples where they are, unless an opening becomes too common to identify a conversation. This module
knows nothing about files or versions.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svc.dataset.checks.check import shared_prompts
from svc.dataset.checks.line_table import LineTable, LineTableBuilder, first_with_same
from svc.dataset.checks.minhash import clusters, nearest, places_in, unite
from svc.dataset.prompt_hashes import NO_PROMPTS, PromptHashes, hash_text
from svc.dataset.schema.example import ChatExample, normal_opening, normal_prompt
from svc.errors import DataError

_FEW_TOGETHER = 4
"""Number of examples that may form one conversation, however small the data set is."""


@dataclass(frozen=True, slots=True)
class HeldoutSplit:
    """Examples split into two parts, both in their original order.

    Attributes:
        learnt_before: number of examples in `train` that would have been held out if no earlier version had
            been trained on their prompts or near duplicates of them.
    """

    train: list[ChatExample]
    heldout: list[ChatExample]
    learnt_before: int


def split_heldout(
    examples: Sequence[ChatExample], share: float, seed: int, learnt: PromptHashes = NO_PROMPTS
) -> HeldoutSplit:
    """Split examples into a training set and a held-out set.

    Examples belong to one conversation if they begin with the same turns up to the first user turn. A group
    of conversations with near duplicates is held out if the smallest hash of its openings, as a fraction of
    the hash range, is below `share`. A group with k different openings is therefore held out with
    probability 1 - (1 - share) ** k. With a share of 0.1, an example without near duplicates is held out
    with probability 0.1, a pair nearly twice as often, and a group of ten 6.5 times as often. In data with
    many near copies, more than `share` is expected to be held out; a large group is held out as a whole.

    In return, added data move no held-out example to the training set, as long as its group stays together
    and more than one group is held out. If no hash is below `share`, the group with the smallest hash is
    held out, and if all are, the group with the largest is trained on. A training example can become a
    held-out one if a near duplicate with a smaller hash is added, which `learnt` prevents.

    Args:
        share: share of the hash range, which is about the share of examples that are held out.
        seed: a different seed holds out different examples.
        learnt: prompts that an earlier version was trained on; any group that contains one of them is
            trained on.

    Raises:
        DataError: nothing can be held out.
    """
    table = _table(examples)
    groups, openings = _groups(table), _openings(examples, share)
    unite(groups, np.arange(len(groups)), first_with_same(openings))
    firsts = np.unique(groups)
    learnt_groups = np.unique(groups[np.isin(table.rows["prompts"], learnt)])
    smallest = np.ones(len(examples))
    np.minimum.at(smallest, groups, _fractions(openings, seed))
    bound = np.union1d(learnt_groups, _answered_elsewhere(table, groups))
    held = _held_groups(firsts, np.setdiff1d(firsts, bound), smallest, share)
    is_held = np.isin(groups, held)
    kept = np.isin(groups, learnt_groups[smallest[learnt_groups] < share])
    return HeldoutSplit(
        train=[examples[place] for place in np.flatnonzero(~is_held)],
        heldout=[examples[place] for place in np.flatnonzero(is_held)],
        learnt_before=int(kept.sum()),
    )


def put_sample_first(examples: Sequence[ChatExample], size: int, seed: int) -> list[ChatExample]:
    """Return the examples with a random sample of `size` first. The sample and the rest each keep their order."""
    drawn = set(_seeded(range(len(examples)), examples, seed)[:size])
    order = sorted(range(len(examples)), key=lambda place: (place not in drawn, place))
    return [examples[place] for place in order]


def mix_general(
    train: Sequence[ChatExample],
    general: Sequence[ChatExample],
    heldout: Sequence[ChatExample],
    share: float,
    seed: int,
) -> list[ChatExample]:
    """Return the general examples to train on in addition to the task's, so that the model forgets less.

    Args:
        general: candidate examples; those that contain an answer to a held-out prompt are never chosen.
        share: share of general examples among all training examples.

    Raises:
        DataError: there are too few candidates.
    """
    wanted = round(share / (1 - share) * len(train))
    leaks = set(shared_prompts(general, heldout))
    usable = [place for place in range(len(general)) if place not in leaks]
    if wanted > len(usable):
        raise DataError(
            f"data.general has only {len(usable)} examples that are not held out",
            expected=f"at least {wanted}, for a share of {share:g} with {len(train)} training examples",
            todo="add general examples, or lower data.general_share",
        )
    return [general[place] for place in sorted(_seeded(usable, general, seed)[:wanted])]


def group_near_duplicates(examples: Sequence[ChatExample]) -> NDArray[np.int64]:
    """Return for each example the index of the first example in its group of equal or nearly equal prompts."""
    return _groups(_table(examples))


def near_leaks(examples: Sequence[ChatExample], heldout: Sequence[ChatExample]) -> list[int]:
    """Return the indices of the examples that are near duplicates of a held-out example."""
    sketches, count = _table([*heldout, *examples]).sketches, len(heldout)
    matches = nearest(sketches[count:], sketches[:count])
    return [int(place) for place in np.flatnonzero(matches >= 0)]


def _groups(table: LineTable) -> NDArray[np.int64]:
    groups, _ = clusters(table.sketches)
    unite(groups, np.arange(len(groups)), first_with_same(table.rows["prompts"]))
    return groups


def _answered_elsewhere(table: LineTable, groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the groups that cannot be held out because a conversation in another group answers their prompts.

    Conversations that begin with a common opening are spread over several groups, and one of them may
    consist of the opening alone.
    """
    places = places_in(table.earlier["prompts"], table.rows["prompts"])
    elsewhere = (places >= 0) & (groups[places] != groups[table.earlier["rows"]])
    bound: NDArray[np.int64] = np.unique(groups[places[elsewhere]])
    return bound


def _openings(examples: Sequence[ChatExample], share: float) -> PromptHashes:
    """Return a hash for each example that is equal for examples of the same conversation.

    It is the hash of the turns up to the first user turn. An opening shared by more examples than are to be
    held out, such as a greeting, belongs to many conversations. In that case the turns up to the next user
    turn are hashed, and so on as often as necessary.
    """
    most, questions = max(_FEW_TOGETHER, share * len(examples)), 1
    openings = _opening_hashes(examples, questions)
    while True:
        _, inverse, counts = np.unique(openings, return_inverse=True, return_counts=True)
        common = np.flatnonzero(counts[inverse] > most)
        questions += 1
        longer = _opening_hashes([examples[place] for place in common], questions)
        if np.array_equal(longer, openings[common]):
            return openings
        openings[common] = longer


def _opening_hashes(examples: Sequence[ChatExample], questions: int) -> PromptHashes:
    return np.fromiter((hash_text(normal_opening(example, questions)) for example in examples), np.uint64)


def _held_groups(
    groups: NDArray[np.int64], free: NDArray[np.int64], smallest: NDArray[np.float64], share: float
) -> NDArray[np.int64]:
    """Return the groups to hold out: at least one, but never all of them.

    Args:
        free: groups that may be held out.
        smallest: smallest hash of each group, from 0 to 1, indexed by group number.
    """
    if len(groups) < 2:
        raise DataError(
            "cannot split off a held-out set: all examples are near duplicates of each other or one conversation",
            expected="at least two different conversations",
            todo="add examples, or set data.heldout to a held-out file",
        )
    if not len(free):
        raise DataError(
            "cannot split off a held-out set: earlier versions of this name were trained on all examples or on near "
            "duplicates of them",
            expected="at least one example that is new to these versions",
            todo="add examples, set data.heldout to a held-out file, or train under another name",
        )
    hashes = smallest[free]
    held = free[hashes < share]
    if not len(held):
        return free[[hashes.argmin()]]
    return held if len(held) < len(groups) else free[np.arange(len(free)) != hashes.argmax()]


def _fractions(hashes: PromptHashes, seed: int) -> NDArray[np.float64]:
    """Return a number from 0 to 1 for each hash. The seed determines the numbers."""
    salt = f"{seed}\x1f".encode()
    digests = (hashlib.blake2b(salt + int(number).to_bytes(8, "little"), digest_size=8).digest() for number in hashes)
    return np.fromiter((int.from_bytes(digest, "little") / 2**64 for digest in digests), np.float64)


def _table(examples: Sequence[ChatExample]) -> LineTable:
    builder = LineTableBuilder()
    for number, example in enumerate(examples):
        builder.add(0, number, example)
    return builder.finish()


def _seeded(places: Sequence[int], examples: Sequence[ChatExample], seed: int) -> list[int]:
    """Return the indices in an order determined by content and seed. Equal examples keep their order."""

    def key(place: int) -> tuple[bytes, int]:
        text = f"{seed}\x1f{normal_prompt(examples[place])}\x1f{examples[place].answer}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest(), place

    return sorted(places, key=key)
