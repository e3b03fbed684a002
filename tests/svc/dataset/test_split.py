"""What is held out is chosen by content and seed, and nothing near to it is trained on."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svc.dataset.schema.example import ChatExample
from svc.dataset.split import group_near_duplicates, mix_general, near_leaks, split_heldout
from svc.errors import DataError
from tests.svc.chats import chat
from tests.svc.dataset.rows import text


def with_copies(seed: int) -> list[ChatExample]:
    """Forty texts, of which every fourth comes again in three near copies."""
    chance, made = random.Random(seed), []
    for number in range(40):
        words = text(chance, 40, 60)
        copies = [f"Heading:\n{words}", f"{words} The end.", words.upper()] if number % 4 == 0 else []
        made += [chat(words, f"answer {number}"), *(chat(copy, f"answer {number}") for copy in copies)]
    chance.shuffle(made)
    return made


@given(st.integers(0, 2**32), st.integers(0, 9), st.floats(0.01, 0.9))
@settings(max_examples=15, deadline=None)
def test_near_duplicates_stay_on_one_side(seed: int, split_seed: int, share: float) -> None:
    examples = with_copies(seed)
    train, heldout = split_heldout(examples, share, split_seed)
    assert sorted(map(hash, [*train, *heldout])) == sorted(map(hash, examples))
    assert train and heldout
    assert near_leaks(train, heldout) == []
    assert not {example.answer for example in train} & {example.answer for example in heldout}


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_share_is_kept_as_well_as_the_groups_allow(share: float) -> None:
    examples = with_copies(1)
    _, heldout = split_heldout(examples, share, 0)
    assert share * len(examples) - 4 <= len(heldout) <= share * len(examples) + 1


def test_the_order_of_the_examples_does_not_matter() -> None:
    examples = [chat(f"question {number}") for number in range(50)]
    _, one = split_heldout(examples, 0.1, 3)
    _, other = split_heldout(examples[::-1], 0.1, 3)
    assert set(one) == set(other) and len(one) == 5


def test_one_at_least_is_held_out_and_equal_prompts_stay_together() -> None:
    examples = [chat("a", "1"), chat("a", "2"), chat("b", "3")]
    train, heldout = split_heldout(examples, 0.01, 0)
    assert (train, heldout) == (examples[:2], examples[2:])
    assert list(group_near_duplicates(examples)) == [0, 0, 2]


def test_copies_of_one_example_cannot_be_split() -> None:
    with pytest.raises(DataError, match="all near duplicates of each other") as caught:
        split_heldout([chat("a"), chat("A"), chat("a ")], 0.1, 0)
    assert "data.heldout" in caught.value.todo


def test_general_examples_are_chosen_by_the_seed() -> None:
    train, general = [chat(f"t{n}") for n in range(90)], [chat(f"g{n}") for n in range(100)]
    chosen = mix_general(train, general, [], 0.1, 0)
    assert len(chosen) == 10 and set(chosen) < set(general)
    assert mix_general(train, general[::-1], [], 0.1, 0)[::-1] == chosen
    assert mix_general(train, general, [], 0.1, 1) != chosen


def test_held_out_prompts_are_no_general_examples() -> None:
    with pytest.raises(DataError, match="holds 1 examples"):
        mix_general([chat("t")], [chat("g"), chat("H ", "x")], [chat("h")], 0.7, 0)
