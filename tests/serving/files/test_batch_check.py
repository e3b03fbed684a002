"""Tests for the check of files of requests."""

from pathlib import Path

import pytest

from serving.files.batch_check import MAX_PROBLEMS, MAX_REQUESTS, check_batch_file
from svc.dataset.readers.row import MAX_ROW_BYTES
from tests.builders.client_files import batch_line


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file-1"


def test_valid_batch_file_has_no_problems(file: Path) -> None:
    completion = batch_line(
        custom_id="b", url="/v1/completions", body={"model": "other@2"}, note="more keys are allowed"
    )
    file.write_bytes(b"\xef\xbb\xbf" + batch_line() + b"\n" + completion)
    check = check_batch_file(file)
    assert (check.requests, check.problems, check.more_problems) == (2, (), False)
    assert check.endpoints == {"/v1/chat/completions", "/v1/completions"}
    assert check.models == ("tuned", "other@2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "param", "code"),
    [
        (batch_line(custom_id="a"), "custom_id", "duplicate_custom_id"),
        (batch_line(custom_id=""), "custom_id", "invalid_request"),
        (batch_line(custom_id=7), "custom_id", "invalid_request"),
        (batch_line(custom_id="x" * 257), "custom_id", "invalid_request"),
        (batch_line(custom_id="\0"), "custom_id", "invalid_request"),
        (batch_line(custom_id="\ud800"), "custom_id", "invalid_request"),
        (batch_line(custom_id="b", method=None), "method", "missing_required_parameter"),
        (batch_line(custom_id="b", method="GET"), "method", "invalid_method"),
        (batch_line(custom_id="b", url="/svc/keys"), "url", "invalid_url"),
        (batch_line(custom_id="b", url=["/v1/completions"]), "url", "invalid_url"),
        (batch_line(custom_id="b", body=[]), "body", "invalid_request"),
        (batch_line(custom_id="b", body={"messages": []}), "body.model", "invalid_request"),
        (batch_line(custom_id="b", body={"model": "x" * 513}), "body.model", "invalid_request"),
        (b"[1]\n", None, "invalid_json_line"),
        (b'{"custom_id": NaN}\n', None, "invalid_json_line"),
        (b"\xff\n", None, "invalid_json_line"),
        (b"[" * 100_000 + b"\n", None, "invalid_json_line"),
        (b'"' + b"x" * MAX_ROW_BYTES + b'"\n', None, "invalid_json_line"),
    ],
    ids=range(18),
)
def test_invalid_batch_request_is_reported_with_its_line_number(
    file: Path, content: bytes, param: str | None, code: str
) -> None:
    file.write_bytes(batch_line() + content + batch_line(custom_id="last"))
    check = check_batch_file(file)
    (problem,) = check.problems
    assert (problem.line, problem.param, problem.code) == (2, param, code)
    assert check.requests == 3
    assert len(problem.message) < 500


def test_empty_batch_file_is_reported_as_a_problem(file: Path) -> None:
    file.write_bytes(b"\n\n")
    (problem,) = check_batch_file(file).problems
    assert (problem.line, problem.code) == (None, "empty_file")


@pytest.mark.slow
def test_batch_file_with_too_many_requests_is_reported_as_a_problem(file: Path) -> None:
    file.write_bytes(b"".join(batch_line(custom_id=str(number)) for number in range(MAX_REQUESTS)))
    assert check_batch_file(file).problems == ()
    with file.open("ab") as end:
        end.write(batch_line(custom_id="one more"))
    (problem,) = check_batch_file(file).problems
    assert (problem.line, problem.code) == (None, "too_many_requests")


def test_number_of_problems_reported_for_a_batch_file_is_limited(file: Path) -> None:
    file.write_bytes(b"{}\n" * (MAX_PROBLEMS + 5))
    check = check_batch_file(file)
    assert len(check.problems) == MAX_PROBLEMS
    assert check.more_problems
