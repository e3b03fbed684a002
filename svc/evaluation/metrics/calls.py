"""Metrics for answers that call tools, which check whether the right tools are called with the right arguments."""

import json
from collections import Counter
from typing import Any

from svc.dataset.schema.tool_calls import calls_in
from svc.evaluation.metrics.metric import AnswerMetric


class CallAccuracy(AnswerMetric):
    """Share of answers that make the same tool calls as the reference, in any order.

    Two calls are the same if they name the same tool and pass the same arguments. Arguments are compared as JSON, so
    the order of keys does not matter, and 1 equals 1.0. If the reference does not call any tool, every answer without
    calls is right, whatever its text.
    """

    name = "call_accuracy"
    title = "right calls"

    def score_answer(self, answer: str, reference: str) -> float:
        return float(_calls(answer) == _calls(reference))


class ToolAccuracy(AnswerMetric):
    """Share of answers that call the same tools as the reference, in any order and with any arguments."""

    name = "tool_accuracy"
    title = "right tools"

    def score_answer(self, answer: str, reference: str) -> float:
        return float(_tools(answer) == _tools(reference))


def _calls(text: str) -> Counter[tuple[str, str]]:
    return Counter((name, _comparable(arguments)) for name, arguments in calls_in(text))


def _comparable(arguments: Any) -> str:
    numbers = json.loads(json.dumps(arguments), parse_float=_shortest)
    return json.dumps(numbers, sort_keys=True)


def _shortest(number: str) -> int | float:
    value = float(number)
    return int(value) if value.is_integer() else value


def _tools(text: str) -> Counter[str]:
    return Counter(name for name, _ in calls_in(text))
