"""Tests that the edit distance equals that of the textbook's table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.evaluation.comparison import edit_distance

texts = st.text(alphabet="abc é", max_size=12)


def by_table(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        above, row = row, [i]
        for j, b in enumerate(second, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


@given(texts, texts)
def test_edit_distance_matches_the_textbook_algorithm(first: str, second: str) -> None:
    assert edit_distance(first, second) == by_table(first, second)


@pytest.mark.parametrize(("first", "second", "edits"), [("kitten", "sitting", 3), ("", "abc", 3), ("same", "same", 0)])
def test_edit_distance_matches_known_values(first: str, second: str, edits: int) -> None:
    assert edit_distance(first, second) == edits


def test_edit_distance_is_correct_for_texts_longer_than_64_characters() -> None:
    assert edit_distance("a" * 500 + "b", "b" + "a" * 500) == 2
