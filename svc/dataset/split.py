"""Which examples judge a version, and which general ones are mixed in: chosen by content and seed, so that it is the
same choice wherever the files lie and in whatever order they are read.

Near duplicates stay on one side: a held-out example that was nearly trained on measures memory. Knows nothing of files.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from svc.dataset.checks.line_table import LineTable, LineTableBuilder, first_with_same
from svc.dataset.checks.minhash import clusters, nearest, unite
from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.normal_prompt import normal_prompt
from svc.errors import DataError


def split_heldout(
    examples: Sequence[ChatExample], share: float, seed: int
) -> tuple[list[ChatExample], list[ChatExample]]:
    """Parts examples into those to train on and those to hold out, both in their order.

    Args:
        share: of the examples, to hold out; at least one is.
        seed: another seed holds out others.

    Raises:
        DataError: no two examples could stand on two sides.
    """
    groups = group_near_duplicates(examples)
    sizes = np.bincount(groups, minlength=len(examples))
    wanted = max(1, round(share * len(examples)))
    firsts = [int(place) for place in np.flatnonzero(sizes)]
    held: set[int] = set()
    taken = 0
    for first in _seeded(firsts, examples, seed):
        if taken + sizes[first] <= wanted:
            held.add(first)
            taken += int(sizes[first])
    if not held:
        held = {min(firsts, key=lambda first: (sizes[first], first))}
    train = [example for example, group in zip(examples, groups, strict=True) if int(group) not in held]
    if not train:
        raise DataError(
            f"no held-out set can be split off {len(examples)} examples: they are all near duplicates of each other",
            expected="at least two different examples",
            todo="add examples, or name a held-out file as data.heldout",
        )
    return train, [example for example, group in zip(examples, groups, strict=True) if int(group) in held]


def mix_general(
    train: Sequence[ChatExample],
    general: Sequence[ChatExample],
    heldout: Sequence[ChatExample],
    share: float,
    seed: int,
) -> list[ChatExample]:
    """Chooses the general examples that are trained on beside the task's, so that the model forgets less.

    Args:
        general: what is chosen from; those whose prompt is held out are never chosen.
        share: of the resulting training examples, that are general.

    Raises:
        DataError: there are too few.
    """
    wanted = round(share / (1 - share) * len(train))
    kept_back = {normal_prompt(example) for example in heldout}
    usable = [place for place, example in enumerate(general) if normal_prompt(example) not in kept_back]
    if wanted > len(usable):
        raise DataError(
            f"data.general holds {len(usable)} examples that are not held out",
            expected=f"at least {wanted}: a share of {share:g} beside {len(train)} training examples",
            todo="add general examples, or lower data.general_share",
        )
    return [general[place] for place in sorted(_seeded(usable, general, seed)[:wanted])]


def group_near_duplicates(examples: Sequence[ChatExample]) -> NDArray[np.int64]:
    """For each example the index of the first one of its group: those with equal prompts, and near duplicates."""
    table = _table(examples)
    groups, _ = clusters(table.sketches)
    unite(groups, np.arange(len(examples)), first_with_same(table.prompts))
    return groups


def near_leaks(examples: Sequence[ChatExample], heldout: Sequence[ChatExample]) -> list[int]:
    """Indices of the examples that ask nearly the same as a held-out one."""
    table = _table([*heldout, *examples])
    sketches, count = table.sketches, len(heldout)
    found = nearest(sketches.part(count, len(table.lines)), sketches.part(0, count))
    return [int(place) for place in np.flatnonzero(found >= 0)]


def _table(examples: Sequence[ChatExample]) -> LineTable:
    builder = LineTableBuilder()
    for number, example in enumerate(examples):
        builder.add(0, number, example)
    return builder.finish()


def _seeded(places: Sequence[int], examples: Sequence[ChatExample], seed: int) -> list[int]:
    """Places in an order that content and seed decide; of equal prompts the first place first."""

    def key(place: int) -> tuple[bytes, int]:
        text = f"{seed}\x1f{normal_prompt(examples[place])}\x1f{examples[place].answer}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest(), place

    return sorted(places, key=key)
