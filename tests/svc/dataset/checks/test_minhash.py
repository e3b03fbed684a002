"""Tests that near duplicates follow their definition, whatever the number of texts."""

import random

import numpy as np
import pytest
from datasketch import MinHash

from svc.dataset.checks.minhash import clusters, nearest
from tests.builders.sketches import sketches
from tests.svc.dataset.rows import text

Pair = tuple[list[str], list[str]]


def runs(words: list[str]) -> set[tuple[str, ...]]:
    edged = ["^", "^", *words, "$", "$"]
    return {tuple(edged[place : place + 3]) for place in range(len(edged) - 2)}


def similarity(pair: Pair) -> float:
    one, other = map(runs, pair)
    return len(one & other) / len(one | other)


def pairs(count: int) -> list[Pair]:
    """Return texts paired with copies in which some words are replaced."""
    chance, made = random.Random(1), []
    for _ in range(count):
        words = [f"w{chance.randrange(10**6)}" for _ in range(chance.randint(60, 120))]
        changed = set(chance.sample(range(len(words)), chance.randint(0, 20)))
        made.append((words, [f"x{word}" if place in changed else word for place, word in enumerate(words)]))
    return made


PAIRS = pairs(400)
FOUND = sketches(*(" ".join(words) for pair in PAIRS for words in pair))


def test_very_similar_pairs_of_texts_are_found_and_dissimilar_pairs_are_not() -> None:
    groups, _ = clusters(FOUND)
    near = groups[0::2] == groups[1::2]
    exact = np.array([similarity(pair) for pair in PAIRS])
    assert (exact > 0.85).sum() > 30 and (exact < 0.5).sum() > 30
    assert near[exact > 0.85].all()
    assert not near[exact < 0.5].any()


def test_texts_with_nothing_in_common_are_never_near_duplicates() -> None:
    groups, _ = clusters(FOUND)
    assert set(groups // 2 * 2) == set(range(0, len(groups), 2))
    assert (groups // 2 == np.arange(len(groups)) // 2).all()


@pytest.mark.slow
def test_similarity_estimate_is_as_accurate_as_a_reference_implementation() -> None:
    exact = np.array([similarity(pair) for pair in PAIRS])
    ours = (FOUND["values"][0::2] == FOUND["values"][1::2]).mean(axis=1)
    theirs = []
    for pair in PAIRS:
        one, other = (MinHash(num_perm=64, seed=1) for _ in pair)
        for sketch, words in zip((one, other), pair, strict=True):
            sketch.update_batch([" ".join(run).encode() for run in runs(words)])
        theirs.append(one.jaccard(other))
    assert ((ours - exact) ** 2).mean() < 1.3 * ((np.array(theirs) - exact) ** 2).mean()


LONG = text(random.Random(5), 50, 60)


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        (LONG, LONG.upper(), True),
        (LONG, f"Description:\n{LONG}", True),
        (LONG, f"{LONG} thank you", True),
        ("what is this?", "What is this", True),
        ("what is this?", "what is that?", False),
        ("", "", False),
        ("?!", "?!", False),
        ("これは何ですか", "これは何ですか。", True),
        ("これは何ですか", "それは何ですか", False),
    ],
)
def test_known_pairs_are_correctly_classified_as_near_duplicates_or_not(one: str, other: str, near: bool) -> None:
    groups, earlier = clusters(sketches(one, "something quite different", other))
    assert bool(groups[2] == 0) == near
    assert int(earlier[2]) == (0 if near else -1)
    assert (int(nearest(sketches(one), sketches(other))[0]) == 0) == near


def test_chain_of_near_duplicates_becomes_one_group() -> None:
    chance = random.Random(2)
    words = [f"w{chance.randrange(10**6)}" for _ in range(80)]
    chain = []
    for step in range(9):
        words[step * 9] = f"changed{step}"
        chain.append(" ".join(words))
    others = [text(random.Random(seed), 20, 30) for seed in range(200)]
    groups, _ = clusters(sketches(*chain, *others))
    assert set(groups[: len(chain)]) == {0}


def test_long_passage_common_to_all_examples_does_not_make_them_near_duplicates() -> None:
    shared = text(random.Random(3), 60, 60)
    groups, _ = clusters(sketches(*(f"{shared}\n{text(random.Random(seed), 4, 9)}" for seed in range(10, 90))))
    assert len(set(groups)) == 80


@pytest.mark.parametrize("count", [5, 8, 40])
def test_shared_text_does_not_make_the_examples_in_a_small_file_near_duplicates(count: int) -> None:
    shared = text(random.Random(3), 45, 45)
    groups, _ = clusters(sketches(*(f"{shared}\n{text(random.Random(seed), 2, 4)}" for seed in range(10, 10 + count))))
    assert len(set(groups)) == count


def test_text_shared_by_exact_copies_is_not_mistaken_for_common_task_instructions() -> None:
    groups, _ = clusters(sketches(*[LONG] * 8, f"Description:\n{LONG}"))
    assert set(groups) == {0}


@pytest.mark.slow
def test_thousands_of_near_copies_of_a_text_are_put_into_one_group() -> None:
    other = [text(random.Random(seed), 30, 40) for seed in range(2_000)]
    groups, _ = clusters(sketches(*other, *(f"{LONG} {number}" for number in range(5_000))))
    assert len(set(groups[2_000:])) == 1


def test_empty_input_has_no_duplicate_groups() -> None:
    groups, earlier = clusters(sketches())
    assert len(groups) == len(earlier) == 0
    assert list(nearest(sketches("a b c"), sketches())) == [-1]
