"""Tests that held-out examples are chosen by content and seed, and that no near duplicate is trained on."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svc.dataset.checks.check import shared_prompts
from svc.dataset.prompt_hashes import hash_answered_prompts, hash_prompts
from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample, parse_example
from svc.errors import DataError
from tests.docs.pages import ROOT
from tests.svc.chats import chat
from tests.svc.dataset.rows import text
from trainer.data.split import group_near_duplicates, mix_general, near_leaks, put_sample_first, split_heldout

TASK = ROOT / "examples" / "debian-triage"


def with_copies(seed: int) -> list[ChatExample]:
    """Return forty texts, every fourth of which has three near copies."""
    chance, made = random.Random(seed), []
    for number in range(40):
        words = text(chance, 40, 60)
        copies = [f"Heading:\n{words}", f"{words} The end.", words.upper()] if number % 4 == 0 else []
        made += [chat(words, f"answer {number}"), *(chat(copy, f"answer {number}") for copy in copies)]
    chance.shuffle(made)
    return made


def unrelated(seed: int, count: int) -> list[ChatExample]:
    """Return texts that no other seed creates."""
    chance = random.Random(seed)
    return [chat(text(chance, 40, 60), f"answer {seed} {number}") for number in range(count)]


@pytest.mark.slow
@given(st.integers(0, 2**32), st.integers(0, 9), st.floats(0.01, 0.99))
@settings(max_examples=15, deadline=None)
def test_near_duplicates_stay_on_the_same_side_of_the_split(seed: int, split_seed: int, share: float) -> None:
    examples = with_copies(seed)
    split = split_heldout(examples, share, split_seed)
    assert sorted(map(hash, [*split.train, *split.heldout])) == sorted(map(hash, examples))
    assert split.train and split.heldout
    assert near_leaks(split.train, split.heldout) == []
    assert not {example.answer for example in split.train} & {example.answer for example in split.heldout}


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_held_out_share_matches_the_requested_share_on_real_examples(share: float) -> None:
    """Hardly any example has a near duplicate. Four standard deviations of 1,200 draws are 0.035 and 0.053."""
    examples = read_examples(TASK / "train.jsonl")
    split = split_heldout(examples, share, 0)
    assert abs(len(split.heldout) / len(examples) - share) < 4 * (share * (1 - share) / len(examples)) ** 0.5


@pytest.mark.slow
def test_duplicate_group_is_held_out_if_any_of_its_hashes_is_below_the_held_out_fraction() -> None:
    """One copy differs only in case and has no hash of its own: three hashes, and 1 - 0.9 ** 3 is 0.271."""
    examples = with_copies(1)
    copied = {example.answer for example in examples if sum(one.answer == example.answer for one in examples) > 1}
    held = [split_heldout(examples, 0.1, seed).heldout for seed in range(100)]
    in_groups = sum(len({example.answer for example in one} & copied) for one in held) / (100 * len(copied))
    alone = sum(len({example.answer for example in one} - copied) for one in held) / (100 * (40 - len(copied)))
    assert in_groups == pytest.approx(0.271, abs=0.06)  # four standard deviations of 1,000 draws
    assert alone == pytest.approx(0.1, abs=0.025)  # of 3,000


@pytest.mark.slow
@given(st.integers(0, 2**32), st.integers(0, 9), st.integers(0, 60))
@settings(max_examples=15, deadline=None)
def test_adding_unrelated_examples_does_not_move_existing_examples_across_the_split(
    seed: int, split_seed: int, more: int
) -> None:
    before = split_heldout(examples := with_copies(seed), 0.2, split_seed)
    after = split_heldout([*unrelated(seed + 1, more), *examples], 0.2, split_seed)
    assert set(before.heldout) <= set(after.heldout)
    assert set(before.train) <= set(after.train)


@pytest.mark.slow
@given(st.integers(0, 2**32), st.integers(0, 9), st.sets(st.integers(0, 69), max_size=30))
@settings(max_examples=15, deadline=None)
def test_duplicate_group_with_a_previously_trained_prompt_is_not_held_out(
    seed: int, split_seed: int, places: set[int]
) -> None:
    examples = with_copies(seed)
    learnt = [examples[place] for place in places]
    split = split_heldout(examples, 0.5, split_seed, hash_prompts(learnt))
    assert not {example.answer for example in learnt} & {example.answer for example in split.heldout}


@pytest.mark.slow
@given(st.integers(0, 2**32), st.integers(0, 9), st.floats(0.01, 0.99))
@settings(max_examples=15, deadline=None)
def test_split_stays_the_same_after_its_training_examples_have_been_trained_on(
    seed: int, split_seed: int, share: float
) -> None:
    """Otherwise, the same recipe would be a different run after it has finished."""
    split = split_heldout(examples := with_copies(seed), share, split_seed)
    again = split_heldout(examples, share, split_seed, hash_prompts(split.train))
    assert (again.train, again.heldout) == (split.train, split.heldout)


def test_split_counts_examples_that_it_keeps_for_training_because_they_were_trained_on_before() -> None:
    examples = unrelated(0, 60)
    held = split_heldout(examples, 0.2, 0).heldout
    assert split_heldout(examples, 0.2, 0, hash_prompts(held[:3])).learnt_before == 3


def test_split_fails_when_all_examples_were_already_trained_on() -> None:
    examples = unrelated(0, 5)
    with pytest.raises(DataError, match="were trained on all examples") as caught:
        split_heldout(examples, 0.2, 0, hash_prompts(examples))
    assert "data.heldout" in caught.value.todo


def test_split_does_not_depend_on_example_order() -> None:
    examples = [chat(f"question {number}") for number in range(50)]
    one = split_heldout(examples, 0.1, 3).heldout
    other = split_heldout(examples[::-1], 0.1, 3).heldout
    assert one == other[::-1] != []


def test_different_seeds_hold_out_different_examples() -> None:
    examples = unrelated(0, 50)
    assert split_heldout(examples, 0.2, 0).heldout != split_heldout(examples, 0.2, 1).heldout


def test_at_least_one_example_is_held_out_and_examples_with_equal_prompts_stay_together() -> None:
    examples = [chat("a", "1"), chat("a", "2"), chat("b", "3")]
    splits = [split_heldout(examples, 0.01, seed) for seed in range(8)]
    assert {tuple(split.heldout) for split in splits} == {tuple(examples[:2]), tuple(examples[2:])}
    assert list(group_near_duplicates(examples)) == [0, 0, 2]


def test_at_least_one_example_is_kept_for_training() -> None:
    examples = unrelated(0, 4)
    assert len(split_heldout(examples, 0.9999, 0).train) == 1


def test_copies_of_a_single_example_cannot_be_split() -> None:
    with pytest.raises(DataError, match="all examples are near duplicates of each other") as caught:
        split_heldout([chat("a"), chat("A"), chat("a ")], 0.1, 0)
    assert "data.heldout" in caught.value.todo


def conversation(*texts: str) -> ChatExample:
    """Return a conversation with these turns, the last of which is the answer."""
    turns = zip(("user", "assistant") * len(texts), texts, strict=False)
    return parse_example({"messages": [{"role": role, "content": content} for role, content in turns]})


@pytest.mark.slow
@pytest.mark.parametrize("greeting", [(), ("Hi", "Hello.")], ids=["different first questions", "the same greeting"])
def test_examples_of_one_conversation_stay_on_the_same_side_of_the_split(greeting: tuple[str, ...]) -> None:
    """In the second case, half of the examples begin with the same user turn; in the first, no two do."""
    chance, examples = random.Random(5), []
    for number in range(100):
        turns = [text(chance, 20, 30) for _ in range(7)]
        begins = greeting if number % 2 else ()
        examples += [conversation(*begins, *turns[:length], f"answer {number}") for length in (1, 3, 5)]
    split = split_heldout(examples, 0.2, 0)
    held = {example.answer for example in split.heldout}
    assert not held & {example.answer for example in split.train}
    assert {int(answer.split()[1]) % 2 for answer in held} == {0, 1}
    assert 10 <= len(held) <= 30  # two and a half standard deviations of 100 draws at 0.2


@pytest.mark.slow
def test_prompt_that_is_also_answered_in_a_training_conversation_is_not_held_out() -> None:
    """The greeting alone is a separate group from each conversation that begins with it, and may be trained on."""
    chance = random.Random(5)
    greeted = [conversation("Hi", "Hello.", text(chance, 20, 30), f"answer {number}") for number in range(30)]
    others = [conversation(text(chance, 20, 30), f"other {number}") for number in range(60)]
    examples = [conversation("Hi", "Hello."), *greeted, *others]
    for seed in range(40):
        split = split_heldout(examples, 0.1, seed)
        assert not shared_prompts(split.train, split.heldout)
        assert split_heldout(examples, 0.1, seed, hash_answered_prompts(split.train)).heldout == split.heldout


def test_split_of_conversations_ignores_their_later_turns() -> None:
    first = [conversation(f"question {number}", "a") for number in range(60)]
    longer = [conversation(f"question {number}", "a", "more?", "b") for number in range(60)]
    held = split_heldout(first, 0.2, 0).heldout
    assert [example.messages[0] for example in split_heldout(longer, 0.2, 0).heldout] == [
        example.messages[0] for example in held
    ]


@given(st.integers(0, 50), st.integers(0, 9), st.integers(1, 60))
def test_sampled_examples_come_first_and_the_rest_keep_their_order(count: int, seed: int, size: int) -> None:
    examples = [chat(f"question {number}") for number in range(count)]
    placed = [examples.index(example) for example in put_sample_first(examples, size, seed)]
    assert sorted(placed) == list(range(count))
    assert placed[:size] == sorted(placed[:size])
    assert placed[size:] == sorted(placed[size:])


@pytest.mark.slow
def test_every_example_is_equally_likely_to_be_sampled() -> None:
    """Each of forty examples is among the ten drawn in a quarter of the draws."""
    examples = [chat(f"question {number}") for number in range(40)]
    draws = [put_sample_first(examples, 10, seed)[:10] for seed in range(400)]
    often = [sum(example in draw for draw in draws) / 400 for example in examples]
    assert min(often) > 0.15 and max(often) < 0.35  # 4.6 standard deviations


def test_sample_of_examples_does_not_depend_on_their_order() -> None:
    examples = [chat(f"question {number}") for number in range(40)]
    one, other = put_sample_first(examples, 10, 0)[:10], put_sample_first(examples[::-1], 10, 0)[:10]
    assert one == other[::-1]


def test_choice_of_general_examples_depends_on_the_seed() -> None:
    train, general = [chat(f"t{n}") for n in range(90)], [chat(f"g{n}") for n in range(100)]
    chosen = mix_general(train, general, [], 0.1, 0)
    assert len(chosen) == 10 and set(chosen) < set(general)
    assert mix_general(train, general[::-1], [], 0.1, 0)[::-1] == chosen
    assert mix_general(train, general, [], 0.1, 1) != chosen


def test_held_out_prompts_are_excluded_from_general_examples() -> None:
    with pytest.raises(DataError, match="has only 1 examples"):
        mix_general([chat("t")], [chat("g"), chat("H ", "x")], [chat("h")], 0.7, 0)
