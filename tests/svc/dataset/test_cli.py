"""Tests the output of `svc data check`, whatever the files contain."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from svc.cli import group
from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.bad_lines import BadLines
from svc.dataset.readers.reader import read_lines

QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def called(arguments: str) -> dict[str, Any]:
    return {"messages": [QUESTION, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]}


HOSTILE = [
    {"messages": [QUESTION, ANSWER], "tools": ["\ud800"]},
    called("\ud800"),
    called("\x1b[2J\n  line 9: error: forged"),
    {"instruction": "i", "output": "o", "history": ["\ud800"]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "\ud800"}]},
]


def check(*arguments: str) -> Result:
    return CliRunner().invoke(group, ["data", "check", *arguments])


@pytest.mark.parametrize("value", HOSTILE, ids=str)
def test_invalid_value_is_printed_without_control_characters_or_invalid_utf8(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(value))
    text, machine = check(str(path)), check(str(path), "--json")
    assert (text.exit_code, machine.exit_code) == (1, 1)
    assert "\x1b" not in text.output and "\n  line 9" not in text.output
    assert json.loads(machine.output)[0]["errors"] >= 1


def test_data_check_prints_problems_even_if_the_file_name_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"n\xff.jsonl")
    path.write_text("{}")
    assert check(str(path), "--json").exit_code == 1


def test_smallest_detectable_quality_loss_is_printed_when_a_held_out_file_is_given(tmp_path: Path) -> None:
    train, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    for path, count in ((train, 3), (heldout, 40)):
        turns = ([QUESTION | {"content": f"{path.stem} {number}"}, ANSWER] for number in range(count))
        path.write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
    said = "are enough to detect, with 80% power, a loss that differs from its limit by at least 0.140"
    assert said in check(str(train), "--heldout", str(heldout)).output
    assert "are enough to detect" not in check(str(train)).output
    assert "are enough to detect" not in check(str(train), "--heldout", str(heldout), "--json").output


def test_answers_are_printed_without_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    turns = [
        [QUESTION | {"content": f"{number}"}, ANSWER | {"content": "a\x1bb" if number % 2 else "c"}]
        for number in range(8)
    ]
    path.write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
    shown = check(str(path)).output
    assert "a\\x1bb 4" in shown and "\x1b" not in shown


@pytest.mark.parametrize("value", HOSTILE, ids=str)
def test_invalid_line_with_control_characters_or_invalid_utf8_is_recorded_in_the_problems_file(
    tmp_path: Path, value: Any
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(value))
    bad = BadLines(tmp_path / "bad")
    (line,) = read_lines(path)
    assert line.error is not None
    bad.add(path, line.number, line.raw, line.error)
    assert json.loads((tmp_path / "bad" / "problems.jsonl").read_text("utf-8"))["line"] == 1


@given(st.text(st.characters()))
def test_data_error_is_printable_even_if_it_contains_arbitrary_text(text: str) -> None:
    error = RowError(Code.WRONG_FORMAT, text, field="x").at("y")
    assert error.wrong.isprintable() and error.wrong.encode()
