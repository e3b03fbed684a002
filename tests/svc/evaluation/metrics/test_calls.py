"""Tests that answers with tool calls are right if they call the reference's tools with equal arguments."""

import json
from typing import Any

import pytest

from svc.dataset.schema.tool_calls import ToolCall, answer_text
from svc.evaluation.metrics.choose import CallAccuracy, ToolAccuracy
from tests.svc.evaluation.answered import answered

Call = tuple[str, dict[str, Any]]
ROME: Call = ("rain", {"city": "Rome", "days": 2})
OSLO: Call = ("rain", {"city": "Oslo", "days": 2})
TIME: Call = ("time", {})


def text(*calls: Call, said: str = "") -> str:
    return answer_text(said, [ToolCall(name, json.dumps(arguments)) for name, arguments in calls])


@pytest.mark.parametrize(
    ("answer", "reference", "calls", "tools"),
    [
        (text(ROME), text(ROME), 1.0, 1.0),
        (text(("rain", {"days": 2.0, "city": "Rome"})), text(ROME), 1.0, 1.0),
        (text(ROME, said="I look."), text(ROME), 1.0, 1.0),
        (text(TIME, ROME), text(ROME, TIME), 1.0, 1.0),
        (text(OSLO), text(ROME), 0.0, 1.0),
        (text(("rain", {"city": "Rome", "days": True})), text(("rain", {"city": "Rome", "days": 1})), 0.0, 1.0),
        (text(("snow", ROME[1])), text(ROME), 0.0, 0.0),
        (text(ROME, ROME), text(ROME), 0.0, 0.0),
        ("It rains.", text(ROME), 0.0, 0.0),
        (text(ROME), "It rains.", 0.0, 0.0),
        ("It is dry.", "It rains.", 1.0, 1.0),
        ('{"name": "rain", "arguments"', text(ROME), 0.0, 0.0),
    ],
)
def test_tool_call_is_correct_when_its_name_and_arguments_match_the_reference(
    answer: str, reference: str, calls: float, tools: float
) -> None:
    pair = answered([(answer, reference)])
    assert (CallAccuracy().score(pair), ToolAccuracy().score(pair)) == ([calls], [tools])
