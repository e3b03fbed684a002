"""Tests that an answer is compared without the thinking that precedes it."""

import pytest

from svc.dataset.text.thinking import without_thinking


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\nI look.\n</think>\n\nnet", "net"),
        ("I look.</think>net", "net"),
        ("<think></think>a</think>", "a</think>"),
        (" net\n", " net\n"),
        ("<think>\nI never stop", "<think>\nI never stop"),
    ],
)
def test_text_up_to_and_including_the_end_of_thinking_is_removed(text: str, answer: str) -> None:
    assert without_thinking(text) == answer
