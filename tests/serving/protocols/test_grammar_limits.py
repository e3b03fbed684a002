"""Tests that a grammar that would block the shared engine is rejected, and an ordinary grammar is accepted."""

import json
import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from serving.protocols.grammar_limits import MAX_ATOMS, MAX_LENGTHS, MAX_PROPERTIES, excess, written_out
from serving.protocols.route import Route
from serving.protocols.unsupported_fields import find_refusal

TEXT = {"type": "string"}


def optional(count: int, **more: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{number}": TEXT for number in range(count)}, **more}


def pattern(text: str) -> dict[str, Any]:
    return {"type": "string", "pattern": text}


TICKET = {
    "type": "object",
    "properties": {
        "id": pattern(r"^[A-Z]{2,5}-\d{1,6}$"),
        "mail": pattern(r"^[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9.-]{1,255}\.[A-Za-z]{2,63}$"),
        "title": {"type": "string", "maxLength": 100_000},
        "tags": {"type": "array", "items": {"enum": [f"tag {number}" for number in range(500)]}, "maxItems": 10_000},
        "pattern": {"type": "object", "properties": {"properties": TEXT}, "maxProperties": 100_000},
    },
    "required": ["id"],
}

SLOW = [
    (optional(MAX_PROPERTIES + 1), "properties per object"),
    (optional(300, maxProperties=150), "maxProperties"),
    (optional(300, minProperties=150), "maxProperties"),
    (pattern("^[a-z]{0,10000}$"), "pattern"),
    (pattern("^[a-z]{10000,}$"), "pattern"),
    (pattern("^([a-z]{0,60},){0,60}$"), "pattern"),
    (pattern("^(([a-z]{0,20},){0,20};){0,20}$"), "pattern"),
    (pattern("^" + "[a-z]?" * 60 + "$"), "pattern"),
    (pattern("^([a-z]?){60}$"), "pattern"),
    ({"type": "object", "patternProperties": {"^a{0,5000}$": TEXT}}, "pattern"),
    ({"anyOf": [pattern("a{900}")] * 20}, "characters in total"),
    ([{"type": "string", "maxLength": number} for number in range(MAX_LENGTHS + 1)], "strings with a length"),
    ({"enum": ["x" * 1000] * 70}, "64 KiB"),
    ({"$defs": {"deep": [[{"items": [pattern("a{9999}")]}]]}}, "pattern"),
]


def test_schema_that_takes_seconds_to_compile_is_rejected() -> None:
    for schema, limit in SLOW:
        text = excess({"json_schema": {"schema": schema}})
        assert text is not None and limit in text, schema
        assert excess({"json": json.dumps(schema)}) == text, schema


def test_ordinary_grammar_is_within_all_limits() -> None:
    cases: list[Any] = [
        None,
        "",
        [],
        TICKET,
        {"json": json.dumps(TICKET)},
        {"json": "{no json"},
        {"regex": r"\d{4}-\d{2}"},
    ]
    assert [grammar for grammar in cases if excess(grammar) is not None] == []


def test_pattern_length_includes_expanded_repetitions() -> None:
    cases: list[tuple[str, int]] = [
        ("abc", 3),
        ("[a-z()]{3}", 3),
        ("a{2,5}", 5),
        ("a{,5}", 5),
        ("a{5,}", 5),
        ("a{0}", 1),
        ("(ab){3}c", 7),
        ("((a{2}b){3}){4}", 36),
        (r"\(a{2}\)", 4),
        ("a|b", 2),
        ("a+b*", 2),
        ("ab?c", 22),
        ("(ab?){3}", 63),
        ("(?:ab)", 3),
        ("a{x}", 4),
        ("(((", 0),
        (")))", 3),
    ]
    assert [text for text, size in cases if written_out(text) != size] == []


def test_repetitions_are_expanded_in_every_regex_notation() -> None:
    assert [
        text
        for text in ("a{99999999999999999999}", "(){9999}", "(a|){9999}", "(a{50}){50}?", "(?:a{50})+{50}")
        if written_out(text) <= MAX_ATOMS
    ] == []


@given(st.text(alphabet="a()[]{}\\,0123456789|*+?", max_size=60))
def test_length_of_an_expanded_regular_expression_is_never_negative(text: str) -> None:
    assert written_out(text) >= 0


def test_scanning_any_schema_pattern_takes_less_than_a_second() -> None:
    for unit in ("[", "{1", "(", "\\", "((a){9}", "{", "1", "[\\"):
        started = time.perf_counter()
        written_out((unit * 65_536)[:65_536])
        assert time.perf_counter() - started < 1, unit


BAD = pattern("a{9999}")
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": BAD}}


def test_every_request_field_with_a_grammar_is_checked() -> None:
    cases: list[tuple[Route, dict[str, Any], str]] = [
        (Route.CHAT_COMPLETIONS, {"response_format": {"json_schema": {"schema": BAD}}}, "response_format"),
        (Route.COMPLETIONS, {"structured_outputs": {"regex": "a{9999}"}}, "structured_outputs"),
        (
            Route.CHAT_COMPLETIONS,
            {"structured_outputs": {"structural_tag": json.dumps({"x": BAD})}},
            "structured_outputs",
        ),
        (Route.CHAT_COMPLETIONS, {"structured_outputs": {"grammar": "x" * 70_000}}, "structured_outputs"),
        (Route.CHAT_COMPLETIONS, {"tools": [FUNCTION], "tool_choice": "required"}, "tools"),
        (Route.CHAT_COMPLETIONS, {"tools": [FUNCTION], "tool_choice": {"type": "function"}}, "tools"),
        (Route.CHAT_COMPLETIONS, {"tools": [{"function": {"strict": True, "parameters": BAD}}]}, "tools"),
        (Route.RESPONSES, {"text": {"format": {"type": "json_schema", "schema": BAD}}}, "text.format"),
        (Route.RESPONSES, {"tools": [{"type": "function", "parameters": BAD, "strict": True}]}, "tools"),
        (Route.RESPONSES, {"tools": [{"type": "namespace", "tools": [{"strict": 1, "parameters": BAD}]}]}, "tools"),
        (Route.MESSAGES, {"output_config": {"format": {"schema": BAD}}}, "output_config.format"),
        (Route.MESSAGES, {"tools": [{"input_schema": BAD}], "tool_choice": {"type": "any"}}, "tools"),
    ]
    for route, fields, param in cases:
        refusal = find_refusal(fields, route)
        assert refusal is not None and refusal.param == param, fields


def test_grammar_limits_apply_only_to_tools_that_the_model_must_call() -> None:
    cases: list[tuple[Route, dict[str, Any]]] = [
        (Route.CHAT_COMPLETIONS, {"tools": [FUNCTION]}),
        (Route.CHAT_COMPLETIONS, {"tools": [FUNCTION], "tool_choice": "auto"}),
        (Route.CHAT_COMPLETIONS, {"tools": [FUNCTION], "tool_choice": "none"}),
        (Route.MESSAGES, {"tools": [{"input_schema": BAD}], "tool_choice": {"type": "auto"}}),
        (Route.RESPONSES, {"text": "a{9999}", "tools": "none"}),
    ]
    assert [fields for route, fields in cases if find_refusal(fields, route) is not None] == []
