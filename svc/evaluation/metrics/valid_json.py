"""Answers that are JSON at all."""

import json
from typing import Any

from svc.evaluation.metrics.metric import Answered, Metric


class ValidJson(Metric):
    """Share of answers that are one JSON object or array."""

    name = "valid_json"
    title = "valid JSON"

    def score(self, answered: Answered) -> list[float]:
        return [float(is_json(answer)) for answer in answered.answers]


def is_json(text: str) -> bool:
    """Whether the text is one valid JSON object or array."""
    return read_json(text) is not None


def read_json(text: str) -> dict[str, Any] | list[Any] | None:
    """The JSON object or array that a text is; None for any other text."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # a model that repeats "[" nests too deeply
        return None
    return value if isinstance(value, dict | list) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
