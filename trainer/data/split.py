"""Selects held-out examples, and the general examples to mix into the training data.

The selection depends only on the examples and the seed, not on file locations or reading order.

Near duplicates are never split between the training and held-out sets, because a held-out example that nearly repeats a
training example would measure memorization. Examples of the same conversation are not split either, since the answer in
one example is context in another. Each group of such examples is assigned by its own hash, so adding data does not move
existing examples, unless the turns that open a conversation become too common to identify it. This module knows nothing
about files or versions.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from svc.dataset.checks.check import shared_prompts
from svc.dataset.checks.line_table import LineTable, LineTableBuilder, first_with_same
from svc.dataset.checks.minhash import clusters, nearest, places_in, unite
from svc.dataset.prompt_hashes import NO_PROMPTS, PromptHashes, hash_text
from svc.dataset.schema.example import ChatExample, normal_opening, normal_prompt
from svc.dataset.stored_examples import select
from svc.errors import DataError

_FEW_TOGETHER = 4
"""Up to this many examples with the same opening (see `_openings`) are always treated as one conversation, even if
fewer examples will be held out."""


@dataclass(frozen=True, slots=True)
class HeldoutSplit:
    """Examples split into a training set and a held-out set, each in the original order.

    Attributes:
        learnt_before: number of examples in `train` that would have been held out if no earlier version had
            been trained on their prompts or near duplicates of them.
    """

    train: Sequence[ChatExample]
    heldout: Sequence[ChatExample]
    learnt_before: int


def split_heldout(
    examples: Sequence[ChatExample], share: float, seed: int, learnt: PromptHashes = NO_PROMPTS
) -> HeldoutSplit:
    """Split examples into a training set and a held-out set.

    Examples belong to one conversation if they have the same opening, which consists of the turns up to the first
    user turn. Conversations that contain near duplicates of each other form a group. A group is held out if the
    smallest hash of its openings, as a fraction of the hash range, is below `share`. A group with k different openings
    is therefore held out with probability 1 - (1 - share) ** k. With a share of 0.1, an example without near duplicates
    is held out with probability 0.1, a pair nearly twice as often, and a group of ten 6.5 times as often. In data with
    many near copies, more than `share` is expected to be held out, because groups are held out as a whole and large
    groups are more likely to be held out.

    Adding data never moves a held-out example to the training set, as long as its group stays together and more than
    one group is held out. If no hash is below `share`, the group with the smallest hash is held out; if all hashes are
    below `share`, the group with the largest hash is trained on. Adding a near duplicate with a smaller hash could turn
    a training example into a held-out one; `learnt` prevents this.

    Args:
        share: fraction of the hash range to hold out, which is roughly the fraction of examples held out.
        seed: seed of the selection.
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
        train=select(examples, np.flatnonzero(~is_held)),
        heldout=select(examples, np.flatnonzero(is_held)),
        learnt_before=int(kept.sum()),
    )


def put_sample_first(examples: Sequence[ChatExample], size: int, seed: int) -> Sequence[ChatExample]:
    """Move a random sample of `size` examples to the front, and return all examples.

    The original order is preserved both within the sample and within the rest.
    """
    drawn = np.zeros(len(examples), bool)
    drawn[_seeded(np.arange(len(examples)), examples, seed)[:size]] = True
    return select(examples, np.concatenate([np.flatnonzero(drawn), np.flatnonzero(~drawn)]))


def mix_general(
    train: Sequence[ChatExample],
    general: Sequence[ChatExample],
    heldout: Sequence[ChatExample],
    share: float,
    seed: int,
) -> Sequence[ChatExample]:
    """Select general examples to train on alongside the task's examples, so that the model forgets less.

    Args:
        general: candidates. Candidates that answer a held-out prompt are never selected.
        share: share of general examples among all training examples.

    Raises:
        DataError: there are too few candidates.
    """
    wanted = round(share / (1 - share) * len(train))
    usable = np.setdiff1d(np.arange(len(general)), shared_prompts(general, heldout))
    if wanted > len(usable):
        raise DataError(
            f"data.general has only {len(usable)} examples that are not held out",
            expected=f"at least {wanted} examples, to make up {100 * share:g}% of all examples when mixed with "
            f"{len(train)} training examples",
            todo="add general examples, or lower data.general_share",
        )
    return select(general, np.sort(_seeded(usable, general, seed)[:wanted]))


def group_near_duplicates(examples: Sequence[ChatExample]) -> NDArray[np.int64]:
    """Group examples whose prompts are equal or nearly equal.

    The result contains, for each example, the index of the first example in its group.
    """
    return _groups(_table(examples))


def near_leaks(examples: Sequence[ChatExample], heldout: Sequence[ChatExample]) -> list[int]:
    """Return the indices of the examples that are near duplicates of a held-out example."""
    sketches, count = _table(chain(heldout, examples)).sketches, len(heldout)
    matches = nearest(sketches[count:], sketches[:count])
    return [int(place) for place in np.flatnonzero(matches >= 0)]


def _groups(table: LineTable) -> NDArray[np.int64]:
    groups, _ = clusters(table.sketches)
    unite(groups, np.arange(len(groups)), first_with_same(table.rows["prompts"]))
    return groups


def _answered_elsewhere(table: LineTable, groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the groups that cannot be held out because another group contains answers to their prompts.

    This happens if conversations with a very common opening are spread over several groups, and one of these
    conversations consists of nothing but the opening.
    """
    places = places_in(table.earlier["prompts"], table.rows["prompts"])
    elsewhere = (places >= 0) & (groups[places] != groups[table.earlier["rows"]])
    bound: NDArray[np.int64] = np.unique(groups[places[elsewhere]])
    return bound


def _openings(examples: Sequence[ChatExample], share: float) -> PromptHashes:
    """Return a hash for each example that is equal for examples of the same conversation.

    The hash covers the turns up to the first user turn. If more examples share this opening than will be held out, as
    with a greeting, the opening is assumed to belong to many conversations. In that case, the hash is extended to the
    next user turn, as often as necessary.
    """
    most, questions = max(_FEW_TOGETHER, share * len(examples)), 1
    openings = _opening_hashes(examples, questions)
    while True:
        _, inverse, counts = np.unique(openings, return_inverse=True, return_counts=True)
        common = np.flatnonzero(counts[inverse] > most)
        questions += 1
        longer = _opening_hashes(select(examples, common), questions)
        if np.array_equal(longer, openings[common]):
            return openings
        openings[common] = longer


def _opening_hashes(examples: Sequence[ChatExample], questions: int) -> PromptHashes:
    return np.fromiter((hash_text(normal_opening(example, questions)) for example in examples), np.uint64)


def _held_groups(
    groups: NDArray[np.int64], free: NDArray[np.int64], smallest: NDArray[np.float64], share: float
) -> NDArray[np.int64]:
    """Select the groups to hold out. This is at least one group, but never all of them.

    Args:
        free: groups that may be held out.
        smallest: smallest hash of each group, scaled to the range from 0 to 1, indexed by group number.
    """
    if len(groups) < 2:
        raise DataError(
            "cannot split off a held-out set: all examples are near duplicates of each other or belong to one "
            "conversation",
            expected="at least two different conversations",
            todo="add examples, or set data.heldout to a held-out file",
        )
    if not len(free):
        raise DataError(
            "cannot split off a held-out set: earlier versions with this name were trained on all examples or on "
            "near duplicates of them",
            expected="at least one example that none of these versions was trained on",
            todo="add examples, set data.heldout to a held-out file, or train under another name",
        )
    hashes = smallest[free]
    held = free[hashes < share]
    if not len(held):
        return free[[hashes.argmin()]]
    return held if len(held) < len(groups) else free[np.arange(len(free)) != hashes.argmax()]


def _fractions(hashes: PromptHashes, seed: int) -> NDArray[np.float64]:
    """Map each hash to a pseudorandom number between 0 and 1 that depends only on the hash and the seed."""
    salt = f"{seed}\x1f".encode()
    digests = (hashlib.blake2b(salt + int(number).to_bytes(8, "little"), digest_size=8).digest() for number in hashes)
    return np.fromiter((int.from_bytes(digest, "little") / 2**64 for digest in digests), np.float64)


def _table(examples: Iterable[ChatExample]) -> LineTable:
    builder = LineTableBuilder()
    for number, example in enumerate(examples):
        builder.add(0, number, example)
    return builder.finish()


def _seeded(places: NDArray[np.int64], examples: Sequence[ChatExample], seed: int) -> NDArray[np.int64]:
    """Shuffle the indices in a way that depends only on the examples' content and the seed. Equal examples keep their
    order.
    """

    def digest(example: ChatExample) -> bytes:
        text = f"{seed}\x1f{normal_prompt(example)}\x1f{example.answer}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    digests = b"".join(map(digest, select(examples, places)))
    high, low = np.frombuffer(digests, ">u8").reshape(-1, 2).T
    order: NDArray[np.int64] = places[np.lexsort((low, high))]
    return order
