"""JSON answers that whoever reads them can rely on: the keys and the types that the references have."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from svc.errors import RecipeError
from svc.evaluation.metrics.metric import Answered, Metric
from svc.evaluation.metrics.valid_json import read_json

JsonSchema = dict[str, Any]


class SchemaValid(Metric):
    """Share of answers that a JSON schema accepts.

    Args:
        schema: JSON Schema, draft 2020-12 unless it says another.
    """

    name = "schema_valid"
    title = "schema valid"

    def __init__(self, schema: JsonSchema) -> None:
        self.schema = schema

    def score(self, answered: Answered) -> list[float]:
        return [float(self.accepts(answer)) for answer in answered.answers]

    def accepts(self, answer: str) -> bool:
        """Whether an answer is JSON that the schema accepts."""
        value = read_json(answer)
        return value is not None and bool(self._validator.is_valid(value))

    @cached_property
    def _validator(self) -> Any:
        from jsonschema.validators import Draft202012Validator, validator_for

        return validator_for(self.schema, default=Draft202012Validator)(self.schema)


def infer_schema(references: Sequence[Any]) -> JsonSchema:
    """The narrowest schema of this kind that accepts all references.

    Types of values; of an object its keys, those that all have required and no others allowed; of a list one schema for
    all items. No bounds and no sets of values: a right answer may have a value that no reference has.
    """
    schema: JsonSchema = {"type": sorted({_type(value) for value in references})}
    if "integer" in schema["type"] and "number" in schema["type"]:
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
    """Reads a JSON schema.

    Raises:
        RecipeError: there is no such file, or it is no JSON schema.
    """
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    try:
        schema = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"cannot read the JSON schema {path}: {error}", todo="correct evaluate.json_schema or leave it out"
        ) from error
    try:
        if not isinstance(schema, dict):
            raise RecipeError(f"{path} holds {schema!r:.80}", expected="a JSON schema: an object")
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        raise RecipeError(
            f"{path} is no JSON schema: {error.message} at {error.json_path}", todo="see https://json-schema.org"
        ) from error
    return schema


def _type(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case dict():
            return "object"
        case _:
            return "null"
