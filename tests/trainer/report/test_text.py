"""Tests that untrusted texts are safe on a page."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.report.page import LONGEST, cut_text, visible


@given(st.text(max_size=9_000))
def test_truncation_removes_exactly_the_reported_number_of_characters(text: str) -> None:
    cut = cut_text(text)
    assert cut.start + cut.rest == visible(text[:LONGEST])
    assert cut.left_out == max(0, len(text) - LONGEST)


@given(st.text(max_size=9_000))
def test_visible_beginning_of_a_collapsed_text_is_short(text: str) -> None:
    start = cut_text(text).start
    assert len(start) <= 350
    assert start.count("\n") <= 7


def test_short_text_is_not_collapsed() -> None:
    assert cut_text("two\nlines") == ("two\nlines", "", 0)


def test_text_with_many_lines_is_collapsed_to_its_first_lines() -> None:
    assert cut_text("\n".join("abcdefghij")).start == "a\nb\nc\nd\ne\nf\n"


@pytest.mark.parametrize(("text", "shown"), [("\x00", "␀"), ("\x1b[31m", "␛[31m"), ("\x7f", "␡"), ("\ud800", "�")])
def test_invisible_characters_are_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_text_in_right_to_left_and_combining_scripts_is_unchanged() -> None:
    text = "مرحبا 👩‍👩‍👧 हिन्दी\tend\n"
    assert visible(text) == text
