"""Tests that users' vLLM arguments are found in every spelling that vLLM accepts."""

import pytest
from hypothesis import given as over
from hypothesis import strategies as st

from svc.engine.vllm.user_args import given, given_flag

OPTION = "--max-model-len"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-model-len", "4k"],
        ["--max-model-len=4k"],
        ["--max_model_len", "4k"],
        ["--max_model_len=4k"],
        ["--max-model", "4k"],
        ["--seed", "1", "--max-model-len", "4k", "--trust"],
        ["--max-model-len", "1", "--max_model_len=4k"],
    ],
)
def test_all_spellings_of_an_option_are_recognized_and_the_last_value_wins(arguments: list[str]) -> None:
    assert given(arguments, OPTION) == "4k"


@pytest.mark.parametrize("arguments", [[], ["--max-model-length", "4"], ["--model", "x"], ["max-model-len"], ["--"]])
def test_option_is_not_recognized_in_arguments_that_merely_resemble_it(arguments: list[str]) -> None:
    assert given(arguments, OPTION) is None


def test_abbreviation_of_a_short_option_is_not_recognized() -> None:
    assert given(["-tp", "2"], "--tensor-parallel-size", "-tp") == "2"
    assert given(["-t", "2"], "--tensor-parallel-size", "-tp") is None


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ([], None),
        (["--enforce-eager"], True),
        (["--enforce_eager"], True),
        (["--no-enforce-eager"], False),
        (["--enforce-eager", "--no-enforce-eager"], False),
        (["--no-enforce-eager", "--seed", "1", "--enforce-eager"], True),
        (["--enable-lora"], None),
    ],
)
def test_flag_is_parsed_as_true_false_or_absent(arguments: list[str], value: bool | None) -> None:
    assert given_flag(arguments, "enforce-eager") is value


@over(st.lists(st.text(max_size=12), max_size=6))
def test_option_is_found_after_arbitrary_arguments(arguments: list[str]) -> None:
    assert given([*arguments, f"{OPTION}=7"], OPTION) == "7"
