"""Tests that JSON answers are compared field by field and with the schema of the references."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.errors import RecipeError
from svc.evaluation.metrics.json_answers import FieldAccuracy, SchemaValid, infer_schema, read_schema
from tests.svc.evaluation.answered import answered

keys = st.sampled_from(["a", "b", "c"])
leaves = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner), max_leaves=8)
objects = st.dictionaries(keys, values)


@pytest.mark.parametrize(
    ("answer", "reference", "share"),
    [
        ('{"a": 1, "b": "x"}', '{"b":"x","a":1}', 1.0),
        ('{"a": 2, "b": "x"}', '{"a": 1, "b": "x"}', 0.5),
        ('{"a": 1, "b": "x", "c": 3}', '{"a": 1, "b": "x"}', 1.0),
        ('{"a": {"b": [1, 2, 4]}}', '{"a": {"b": [1, 2, 3]}}', 2 / 3),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a": 1.0}', '{"a": 1}', 1.0),
        ('{"a": null}', '{"a": null}', 1.0),
        ('{"a": []}', '{"a": {}}', 0.0),
        ("[1]", '{"a": 1}', 0.0),
        ("no JSON", '{"a": 1}', 0.0),
        ("{}", "{}", 1.0),
    ],
)
def test_json_field_is_correct_when_its_value_matches_the_reference(answer: str, reference: str, share: float) -> None:
    assert FieldAccuracy().score(answered([(answer, reference)])) == [pytest.approx(share)]


@given(objects)
def test_json_object_compared_with_itself_has_full_field_accuracy(value: dict[str, Any]) -> None:
    text = json.dumps(value)
    assert FieldAccuracy().score(answered([(text, text)])) == [1.0]


@given(st.lists(objects, min_size=1, max_size=5))
def test_inferred_schema_accepts_all_references(references: list[dict[str, Any]]) -> None:
    metric = SchemaValid(infer_schema(references))
    assert all(metric.accepts(json.dumps(reference)) for reference in references)


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ('{"name": "other", "size": 3}', True),
        ('{"name": "x", "size": 3, "tags": ["a"]}', True),
        ('{"name": "x"}', False),
        ('{"name": "x", "size": "3"}', False),
        ('{"name": "x", "size": 3, "colour": "red"}', False),
        ('{"name": "x", "size": 3, "tags": [1]}', False),
        ("name: x", False),
    ],
)
def test_answer_must_match_the_json_schema_inferred_from_the_references(answer: str, valid: bool) -> None:
    schema = infer_schema([{"name": "a", "size": 1}, {"name": "b", "size": 2, "tags": ["t"]}])
    assert SchemaValid(schema).score(answered([(answer, "{}")])) == [float(valid)]


def test_schema_inferred_from_floats_accepts_integers() -> None:
    assert SchemaValid(infer_schema([{"a": 1}, {"a": 1.5}])).accepts('{"a": 2}')


@pytest.mark.parametrize(
    ("content", "wrong"),
    [("{", "cannot read the JSON schema"), ("[]", "a JSON object"), ('{"type": "strnig"}', "'strnig' is not valid")],
)
def test_invalid_json_schema_error_names_the_file(tmp_path: Path, content: str, wrong: str) -> None:
    path = tmp_path / "schema.json"
    path.write_text(content, "utf-8")
    with pytest.raises(RecipeError) as caught:
        read_schema(path)
    assert wrong in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_json_schema_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"missing\.json"):
        read_schema(tmp_path / "missing.json")
