"""Tests that every error says what is wrong, what was expected and what to do, and has a stable exit code."""

from svc import errors
from svc.errors import DataError, ProbeError, SvcError
from tests.builders.error_types import kinds


def test_error_text_states_the_problem_and_what_was_expected_and_what_to_do() -> None:
    error = DataError("x.jsonl:3: not JSON", expected="one object in a line", todo="fix the line")
    assert str(error) == "x.jsonl:3: not JSON\n  expected: one object in a line\n  do: fix the line"


def test_error_text_omits_lines_for_missing_fields() -> None:
    assert str(DataError("wrong")) == "wrong"


def test_exit_codes_distinguish_error_types() -> None:
    codes = {kind.__name__: kind.exit_code for kind in kinds() if kind is not ProbeError}
    assert len(set(codes.values())) == len(codes)
    assert SvcError.exit_code not in codes.values()


def test_failed_verification_probe_is_an_engine_error() -> None:
    assert ProbeError.exit_code == errors.EngineError.exit_code


def test_exit_codes_do_not_collide_with_shell_exit_codes() -> None:
    every: list[type[SvcError]] = [SvcError, *kinds()]
    assert [kind for kind in every if not 0 < kind.exit_code < 126] == []
