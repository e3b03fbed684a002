"""Tests valid and invalid JSON answers."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.evaluation.metrics.json_answers import is_json
from tests.svc.json_values import json_values


@pytest.mark.parametrize(
    "text", ["", "net", "5", '"net"', "null", "{", "[NaN]", '{"a": Infinity}', "[" * 5000, "{} {}", "[" + "9" * 5000]
)
def test_text_other_than_a_json_object_or_list_counts_as_invalid_json(text: str) -> None:
    assert not is_json(text)


@pytest.mark.slow
@given(st.lists(json_values) | st.dictionaries(st.text(), json_values))
def test_json_object_or_list_counts_as_valid_json(value: Any) -> None:
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        return
    assert is_json(f" {text}\n")


@given(st.text() | st.text(alphabet='[]{}",:0eE+-. nulltrueNaN'))
def test_any_answer_is_classified_as_valid_or_invalid_json(text: str) -> None:
    assert is_json(text) in (True, False)
