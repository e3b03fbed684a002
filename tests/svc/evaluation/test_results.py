"""Tests that results stored at registration are read as they were written, or not at all."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from svc.errors import IntegrityError
from svc.evaluation.results import ExampleResult, largest_limit, read_results, write_results

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(codec="utf-8"))
RESULTS = st.builds(
    ExampleResult,
    answer=TEXTS,
    tokens=st.integers(0, 2**31),
    limit=st.integers(1, 2**31),
    finish_reason=st.sampled_from(["stop", "length"]),
    logprob=st.none() | NUMBERS,
    nll=NUMBERS,
    scored=st.integers(1, 2**31),
    hit=st.booleans(),
)
RESULT = ExampleResult(
    answer="a\nb\u2028c\r\n", tokens=3, limit=8, finish_reason="stop", logprob=-0.25, nll=1.5, scored=1, hit=True
)


@given(st.lists(RESULTS, max_size=4))
def test_written_results_round_trip_exactly(
    tmp_path_factory: pytest.TempPathFactory, results: list[ExampleResult]
) -> None:
    path = tmp_path_factory.mktemp("results") / "merged.jsonl"
    write_results(path, results)
    assert read_results(path) == tuple(results)


def test_largest_limit_is_the_highest_answer_token_limit_of_any_result() -> None:
    assert largest_limit([RESULT, RESULT.model_copy(update={"limit": 40}), RESULT]) == 40


def test_results_file_has_one_line_per_example(tmp_path: Path) -> None:
    write_results(tmp_path / "merged.jsonl", [RESULT, RESULT])
    assert (tmp_path / "merged.jsonl").read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"answer": "a"',
        b"\xff",
        RESULT.model_dump_json().encode().replace(b'"hit"', b'"Hit"'),
        RESULT.model_dump_json().encode().replace(b"1.5", b"NaN"),
        RESULT.model_dump_json().encode().replace(b"{", b'{"note": 1, '),
    ],
)
def test_error_for_an_invalid_line_contains_the_line_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "merged.jsonl"
    path.write_bytes(RESULT.model_dump_json().encode() + b"\n" + line + b"\n")
    with pytest.raises(IntegrityError, match=r"merged\.jsonl:2 is not a valid result"):
        read_results(path)


def test_missing_results_file_raises_integrity_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="cannot read"):
        read_results(tmp_path / "merged.jsonl")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_result_with_a_non_finite_number_is_rejected(number: float) -> None:
    with pytest.raises(ValidationError):
        ExampleResult.model_validate(RESULT.model_dump() | {"nll": number})
