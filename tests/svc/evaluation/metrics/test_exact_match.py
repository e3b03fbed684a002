"""Tests whether an answer equals its reference."""

import pytest

from svc.evaluation.metrics.text import matches


@pytest.mark.parametrize(
    ("answer", "same"), [("net", True), (" net\n", True), ("Net", False), ("", False), ("net.", False)]
)
def test_exact_match_ignores_surrounding_whitespace(answer: str, same: bool) -> None:
    assert matches(answer, "net") is same
