"""Tests that an accepted text counts anywhere in an answer, but only as complete words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.evaluation.general.contains import Contains
from tests.svc.evaluation.answered import answered

words = st.text(alphabet='ab1 .,{"', min_size=1, max_size=8).filter(lambda text: bool(text.strip()))


def is_right(answer: str, *accepted: str) -> bool:
    return Contains([accepted]).score(answered([(answer, "any")])) == [1.0]


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("The capital is PARIS.", "Paris"),
        ("It is 5.", "5"),
        ("1, 2,3", "1, 2, 3"),
        ('Sure: {"a":1}', '{"a": 1}'),
        ("The  houses\nare old", "houses are old"),
        ("don't", "don't"),
        ("STRASSE", "straße"),
    ],
)
def test_answer_containing_an_accepted_string_is_correct(answer: str, accepted: str) -> None:
    assert is_right(answer, "something else", accepted)


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [("Parisian", "Paris"), ("1,000", "1"), ("15", "5"), ("2.5", "5"), ("houses old are", "houses are old"), ("", "a")],
)
def test_answer_containing_no_accepted_string_is_wrong(answer: str, accepted: str) -> None:
    assert not is_right(answer, accepted)


@given(words, st.sampled_from(["", "so ", "it is: "]), st.sampled_from(["", "!", " - yes"]))
def test_text_around_the_accepted_string_is_ignored(accepted: str, before: str, after: str) -> None:
    assert is_right(f"{before} {accepted} {after}", accepted)
