"""Tests that texts without visible characters are blank, and that texts that look the same are equal."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.schema.example import normal_prompt, parse_example
from svc.dataset.text.plain_text import is_blank, normal
from tests.builders.sketches import sketches
from tests.svc.chats import chat, turn

NOTHING = "\u200b\ufeff\u00ad\u2060\u3164\u2800\u0000\u00a0\u3000\u200d\u202e\u115f \n\t\x1b\u2028"
words = st.text(st.characters(codec="utf-8"))


@given(st.text(alphabet=NOTHING))
def test_text_without_visible_characters_is_blank(text: str) -> None:
    assert is_blank(text)


@given(words, st.sampled_from(["a", "5", ".", "ß", "日", "\U0001fae9", "\uf8ff", "\u0301", "\U000f0000"]), words)
def test_text_with_visible_characters_is_not_blank(before: str, shown: str, after: str) -> None:
    assert not is_blank(before + shown + after)


@pytest.mark.parametrize("text", list(NOTHING))
def test_turn_without_visible_characters_is_rejected(text: str) -> None:
    for turns in ([turn("user", text), turn("assistant", "a")], [turn("user", "a"), turn("assistant", text)]):
        with pytest.raises(RowError) as caught:
            parse_example({"messages": turns})
        assert caught.value.code is Code.WRONG_CONTENT


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Where is the café?", "Where is the cafe\u0301?"),
        ("Where is ABC?", "Where is ＡＢＣ?"),  # noqa: RUF001
        ("Donaudampfschiff", "Donau\u00addampf\u200bschiff\ufeff"),
        ("Straße", "STRASSE"),
        ("한국", "\u1112\u1161\u11ab\u1100\u116e\u11a8"),
        ("a\u3000b", "A  b"),
    ],
)
def test_visually_identical_texts_are_equal(one: str, other: str) -> None:
    assert normal(one) == normal(other)
    assert normal_prompt(chat(one)) == normal_prompt(chat(other))
    first, second = sketches(one, other)["values"]
    assert (first == second).all()


@pytest.mark.parametrize(
    ("one", "other"), [("5²", "52"), ("m²", "m2"), ("क्\u200dष", "क्ष"), ("👩\u200d👧", "👩👧"), ("ﬁ x", "f x")]
)
def test_texts_with_different_content_are_unequal(one: str, other: str) -> None:
    assert normal(one) != normal(other)


@given(words)
def test_unicode_normalization_form_does_not_affect_equality(text: str) -> None:
    assert normal(unicodedata.normalize("NFD", text)) == normal(unicodedata.normalize("NFC", text))
