"""Metrics for JSON answers: whether they are valid, agree with the reference's fields and conform to a schema."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

from svc.errors import RecipeError
from svc.evaluation.metrics.metric import AnswerMetric

JsonSchema = dict[str, Any]
_Path = tuple[str | int, ...]
_TYPES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    NoneType: "null",
}


def is_json(text: str) -> bool:
    """Return whether a text is a single valid JSON object or array."""
    return read_json(text) is not None


def read_json(text: str) -> dict[str, Any] | list[Any] | None:
    """Parse a text that is a JSON object or array. Return None for any other text."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # a model that repeats "[" nests too deeply
        return None
    return value if isinstance(value, dict | list) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class ValidJson(AnswerMetric):
    """Share of answers that are a single JSON object or array."""

    name = "valid_json"
    title = "valid JSON"

    def score_answer(self, answer: str, reference: str) -> float:
        return float(is_json(answer))


class FieldAccuracy(AnswerMetric):
    """Share of the fields in a reference that have the same value in the answer, averaged over examples.

    A field is a value that contains no other values, at any depth of nested objects and lists. Additional
    fields in the answer are ignored here, because `schema_valid` detects them. An answer that is not JSON
    has no fields.
    """

    name = "field_accuracy"
    title = "field accuracy"

    def score_answer(self, answer: str, reference: str) -> float:
        if not is_json(answer):
            return 0.0
        given, right = dict(_fields(read_json(answer))), dict(_fields(read_json(reference)))
        hits = sum(path in given and _equal(given[path], value) for path, value in right.items())
        return hits / len(right)


def _fields(value: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """Yield the path and value of each field in a JSON value. An empty object or list also counts as a field."""
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _fields(inner, (*path, key))
    else:
        yield path, value


def _equal(one: Any, other: Any) -> bool:
    """Return whether two values are equal as JSON values: 1 equals 1.0, but 1 does not equal true."""
    return bool(one == other) and isinstance(one, bool) is isinstance(other, bool)


class SchemaValid(AnswerMetric):
    """Share of answers that conform to a JSON schema. A program can rely on the keys and types of such answers.

    Args:
        schema: the JSON schema. Draft 2020-12 is assumed unless the schema specifies another draft.
    """

    name = "schema_valid"
    title = "schema valid"

    def __init__(self, schema: JsonSchema) -> None:
        self.schema = schema

    def score_answer(self, answer: str, reference: str) -> float:
        return float(self.accepts(answer))

    def accepts(self, answer: str) -> bool:
        """Return whether an answer is JSON and conforms to the schema."""
        value = read_json(answer)
        return value is not None and bool(self._validator.is_valid(value))

    @cached_property
    def _validator(self) -> Any:
        from jsonschema.validators import Draft202012Validator, validator_for

        return validator_for(self.schema, default=Draft202012Validator)(self.schema)


def infer_schema(references: Sequence[Any]) -> JsonSchema:
    """Infer a schema that accepts all references and restricts types and keys as narrowly as possible.

    The schema specifies types. For objects, it also lists the allowed keys, and requires each key that occurs in all
    references. For lists, a single schema applies to all items. Values are not restricted, because a right answer may
    contain a value that occurs in no reference.
    """
    schema: JsonSchema = {"type": sorted({_TYPES[type(value)] for value in references})}
    if {"integer", "number"} <= set(schema["type"]):
        schema["type"].remove("integer")
    objects = [value for value in references if isinstance(value, dict)]
    if objects:
        keys = {key: None for value in objects for key in value}
        schema["properties"] = {key: infer_schema([value[key] for value in objects if key in value]) for key in keys}
        schema["required"] = [key for key in keys if all(key in value for value in objects)]
        schema["additionalProperties"] = False
    items = [item for value in references if isinstance(value, list) for item in value]
    if items:
        schema["items"] = infer_schema(items)
    return schema


def read_schema(path: Path) -> JsonSchema:
    """Read a JSON schema from a file.

    Raises:
        RecipeError: the file is missing or is not a JSON schema.
    """
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    try:
        schema = json.loads(path.read_text("utf-8"))
        if not isinstance(schema, dict):
            raise TypeError(f"it contains {schema!r:.80}")
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except (OSError, ValueError, TypeError, SchemaError) as error:
        reason = f"{error.message} at {error.json_path}" if isinstance(error, SchemaError) else error
        raise RecipeError(
            f"cannot read the JSON schema {path}: {reason}",
            expected="a JSON object as described at https://json-schema.org",
            todo="correct evaluate.json_schema, or remove it",
        ) from error
    return schema
