"""Tests the detection of near copies, including after a restart."""

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.drift import near_copies
from monitoring.drift.near_copies import COMPARED, FORGOTTEN_S, RARITY_REQUESTS, NearCopies, Words

HOUR = 3_600.0
TEMPLATE = range(1_000_000, 1_000_020)
"""Words of a form that clients fill in."""


def words(numbers: Iterable[int]) -> Words:
    return np.array(sorted(set(numbers)), dtype=np.int32)


def distinct(number: int, count: int = 20) -> Words:
    """Return the words of a prompt that shares no words with any other prompt."""
    return words(range(number * count, (number + 1) * count))


def form(number: int) -> Words:
    """Return the words of a form, filled in with different words each time."""
    return words([*TEMPLATE, *range(number * 8, (number + 1) * 8)])


def decide(copies: NearCopies, prompts: Sequence[Words], times: Sequence[float] | None = None) -> list[bool]:
    moments = times or [60.0 * place for place in range(len(prompts))]
    return [copies.is_near_copy(prompt, time) for prompt, time in zip(prompts, moments, strict=True)]


def test_request_with_the_same_words_as_an_earlier_request_is_a_near_copy() -> None:
    assert decide(NearCopies([]), [distinct(1), distinct(2), distinct(1)]) == [False, False, True]


def test_requests_that_share_no_words_are_not_near_copies() -> None:
    assert decide(NearCopies([]), [distinct(number) for number in range(30)]) == [False] * 30


def test_request_with_10_percent_of_its_words_replaced_is_a_near_copy() -> None:
    rephrased = words([*distinct(1)[2:], 9_001, 9_002])
    others = [distinct(number) for number in range(2, 60)]
    assert decide(NearCopies([]), [distinct(1), *others, rephrased])[-1]


def test_request_with_half_of_its_words_replaced_is_not_a_near_copy() -> None:
    rephrased = words([*distinct(1)[10:], *range(9_000, 9_010)])
    assert decide(NearCopies([]), [distinct(1), rephrased]) == [False, False]


@pytest.mark.slow
def test_template_prompts_are_near_copies_only_until_template_words_become_common() -> None:
    copies = NearCopies([distinct(number) for number in range(5_000, 5_200)])
    results = decide(copies, [form(number) for number in range(300)])
    assert results[1]
    assert not any(results[200:])


def test_prompts_from_a_template_are_not_near_copies_if_reference_prompts_use_the_same_template() -> None:
    reference = [form(number) for number in range(1_000, 1_200)]
    assert decide(NearCopies(reference), [form(number) for number in range(50)]) == [False] * 50


def test_repeated_template_prompt_is_a_near_copy_although_its_words_are_common() -> None:
    reference = [form(number) for number in range(1_000, 1_200)]
    assert decide(NearCopies(reference), [form(1), form(2), form(1)]) == [False, False, True]


@pytest.mark.parametrize(("after", "expected"), [(0.0, True), (23 * HOUR, True), (FORGOTTEN_S, False)])
def test_repeated_request_counts_again_after_one_day(after: float, expected: bool) -> None:
    assert decide(NearCopies([]), [distinct(1), distinct(1)], [1e9, 1e9 + after]) == [False, expected]


def test_request_repeated_all_day_counts_once_per_day() -> None:
    times = [hour * HOUR for hour in range(72)]
    results = decide(NearCopies([]), [distinct(1)] * 72, times)
    assert [place for place, copy in enumerate(results) if not copy] == [0, 24, 48]


@pytest.mark.parametrize(("between", "expected"), [(COMPARED - 1, True), (COMPARED, False)])
def test_request_is_compared_only_with_the_newest_100_requests_that_are_not_near_copies(
    between: int, expected: bool
) -> None:
    others = [distinct(number) for number in range(2, 2 + between)]
    assert decide(NearCopies([]), [distinct(1), *others, distinct(1)])[-1] is expected


def test_near_copies_do_not_displace_the_100_requests_used_for_comparison() -> None:
    assert decide(NearCopies([]), [distinct(1), *[distinct(2)] * 500, distinct(1)])[-1]


@pytest.mark.slow
def test_words_become_rare_again_if_no_recent_request_contains_them() -> None:
    copies = NearCopies([])
    decide(copies, [form(number) for number in range(200)])
    assert decide(copies, [form(300), form(301)], [1e5, 1e5]) == [False, False]
    decide(copies, [distinct(number) for number in range(5_000, 5_000 + RARITY_REQUESTS)])
    assert decide(copies, [form(500), form(501)], [1e6, 1e6]) == [False, True]


@pytest.mark.parametrize("count", [0, 1])
def test_request_with_no_words_or_one_word_is_a_near_copy_when_repeated(count: int) -> None:
    same, other = distinct(1, count), distinct(2, 3)
    assert decide(NearCopies([]), [same, other, same]) == [False, False, True]


def test_request_without_words_is_not_a_near_copy_of_a_request_with_words() -> None:
    assert decide(NearCopies([]), [distinct(1), words([])]) == [False, False]


prompts = st.lists(st.sets(st.integers(0, 8), max_size=5).map(words), max_size=40)


@given(prompts, prompts, st.integers(0, 40))
def test_restart_does_not_change_which_prompts_are_detected_as_near_copies(
    reference: list[Words], stream: list[Words], cut: int
) -> None:
    """After a restart, the check remembers all requests seen and then those counted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_copies, "RARITY_REQUESTS", 7)
        times = [10_000.0 * place for place in range(len(stream))]
        expected = decide(NearCopies(reference), stream, times)
        restarted = NearCopies(reference)
        for prompt in stream[:cut][-7:]:
            restarted.see(prompt)
        for place, prompt in enumerate(stream[:cut]):
            if not expected[place]:
                restarted.keep(prompt, times[place])
        assert decide(restarted, stream[cut:], times[cut:]) == expected[cut:]


@given(prompts, st.integers(0, 40))
def test_same_near_copies_are_found_when_earlier_requests_are_restored_from_a_previous_check(
    stream: list[Words], cut: int
) -> None:
    expected = decide(NearCopies([]), stream)
    restarted = NearCopies([])
    for place, prompt in enumerate(stream[:cut]):
        restarted.see(prompt)
        if not expected[place]:
            restarted.keep(prompt, 60.0 * place)
    times = [60.0 * place for place in range(len(stream))]
    assert decide(restarted, stream[cut:], times[cut:]) == expected[cut:]
