"""Tests that Promptfoo tests become examples, templates run no code, and errors name the invalid line."""

from pathlib import Path

import pytest

from svc.dataset.problem.problem import Code
from svc.dataset.readers.reader import Line, read_examples, read_lines
from svc.dataset.schema.example import ChatExample

SUITE = """\
description: colours
prompts:
  - "Which colour has {{ thing }}?"
  - '[{"role": "system", "content": "Be short."}, {"role": "user", "content": "{{thing}}?"}]'
defaultTest:
  vars: {thing: snow}
tests:
  - vars: {thing: "{{ grass }}"}
    assert:
      - {type: llm-rubric, value: is polite}
      - {type: equals, value: green}
  - assert: [{type: contains, value: "white"}]
"""


def lines(folder: Path, text: str) -> list[Line[ChatExample]]:
    (folder / "promptfooconfig.yaml").write_text(text, "utf-8")
    return list(read_lines(folder / "promptfooconfig.yaml"))


def test_each_combination_of_test_and_prompt_becomes_an_example(tmp_path: Path) -> None:
    read = lines(tmp_path, SUITE)
    assert [line.number for line in read] == [8, 8, 12, 12]
    assert [(line.example.question, line.example.answer) for line in read if line.example] == [
        ("Which colour has {{ grass }}?", "green"),  # the value of a variable is not a template
        ("{{ grass }}?", "green"),
        ("Which colour has snow?", "white"),
        ("snow?", "white"),
    ]
    assert len(read_examples(tmp_path / "promptfooconfig.yaml")) == 4


@pytest.mark.parametrize(
    ("prompt", "test", "wrong"),
    [
        ("{% for x in y %}", "{vars: {x: a}, assert: [{type: equals, value: b}]}", "code in its template"),
        ("{{ x | upper }}", "{vars: {x: a}, assert: [{type: equals, value: b}]}", "code in its template"),
        ("{{ y }}", "{vars: {x: a}, assert: [{type: equals, value: b}]}", "which is not in vars"),
        ("{{ x }}", "{vars: {x: a}, assert: [{type: llm-rubric, value: b}]}", "no reference answer, only llm-rubric"),
        ("{{ x }}", "{vars: {x: a}}", "no reference answer"),
        ("{{ x }}", "{vars: {x: [a, b]}, assert: [{type: equals, value: b}]}", "is a list"),
        ("{{ x }}", "{vars: {x: 'file://../secret.txt'}, assert: [{type: equals, value: b}]}", "secret.txt"),
        ("{{ x }}", "{vars: {x: 'file://code.js'}, assert: [{type: equals, value: b}]}", "code.js"),
        ("{{ x }}", "{vars: {x: a}, assert: [{type: equals, value: b}, {type: equals, value: c}]}", "different values"),
        ("{{ x }}", "oops", "is 'oops'"),
    ],
)
def test_unconvertible_promptfoo_test_is_reported_with_its_line_number(
    prompt: str, test: str, wrong: str, tmp_path: Path
) -> None:
    (tmp_path.parent / "secret.txt").write_text("secret", "utf-8")
    (line,) = lines(tmp_path, f'prompts: ["{prompt}"]\ntests:\n  - {test}\n')
    assert line.example is None
    assert line.error is not None
    assert line.error.code is Code.WRONG_FORMAT
    assert wrong in str(line.error)
    assert line.number == 3


def test_promptfoo_prompt_can_be_read_from_a_file_next_to_the_suite(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Ask {{x}}\n", "utf-8")
    (line,) = lines(tmp_path, "prompts: ['file://p.txt']\ntests: [{vars: {x: a}, assert: [{type: equals, value: b}]}]")
    assert line.example is not None
    assert line.example.question == "Ask a"


@pytest.mark.parametrize("text", ["- a", "tests: file://x.csv", "prompts: [a\n", "tests: []"])
def test_file_that_is_not_a_promptfoo_suite_yields_one_error(text: str, tmp_path: Path) -> None:
    (line,) = lines(tmp_path, text)
    assert line.error is not None
