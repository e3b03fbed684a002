"""Tests the checks of clients' files."""

import sqlite3
from pathlib import Path

import pytest

from serving.files import content_check
from serving.files.content_check import ContentCheck, check_content
from serving.files.rows import Purpose
from tests.builders.client_files import EXAMPLE, batch_line
from tests.published_examples import published


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file-1"


def test_file_whose_examples_cause_only_warnings_is_usable(file: Path) -> None:
    file.write_text(EXAMPLE * 2 + "\n")
    assert check_content(file, Purpose.FINE_TUNE) == ContentCheck(True)


def test_training_files_published_by_openai_are_usable(file: Path) -> None:
    file.write_text(published(toy=4, drone=3))
    assert check_content(file, Purpose.FINE_TUNE) == ContentCheck(True)


def test_errors_in_examples_are_described_with_line_numbers(file: Path) -> None:
    file.write_text(EXAMPLE + "no JSON\n" + EXAMPLE + '{"messages": []}\n')
    check = check_content(file, Purpose.FINE_TUNE)
    assert not check.usable and check.details is not None
    assert "line 2: invalid JSON" in check.details and "line 4: " in check.details
    assert str(file.parent) not in check.details


def test_description_of_an_unusable_file_lists_only_the_first_errors(file: Path) -> None:
    file.write_text("no JSON\n" * 500)
    details = check_content(file, Purpose.FINE_TUNE).details or ""
    assert "line 20: " in details and "line 21: " not in details
    assert details.endswith("and 481 more errors")  # one of them: the file has no examples


@pytest.mark.slow
def test_check_stops_reading_a_file_with_too_many_errors(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svc.dataset.checks.check.check_files", None)
    file.write_text((EXAMPLE + "no JSON\n") * 100_000)
    details = check_content(file, Purpose.FINE_TUNE).details or ""
    assert details.startswith("line 2: invalid JSON: ")
    assert details.endswith("and at least 4980 more errors")


def test_file_text_quoted_in_an_error_is_escaped_and_truncated(file: Path) -> None:
    file.write_bytes(b'{"\\ud800\\u0000' + b"x" * 10_000 + b'": 1}\n')
    details = check_content(file, Purpose.FINE_TUNE).details or ""
    assert 0 < len(details) < 1000
    assert details.isprintable()
    details.encode("utf-8")


def test_empty_file_is_unusable(file: Path) -> None:
    file.write_text("\n\n")
    assert "no examples" in (check_content(file, Purpose.FINE_TUNE).details or "")
    assert "no requests" in (check_content(file, Purpose.BATCH).details or "")


def test_invalid_requests_in_an_uploaded_batch_file_are_reported_by_line(file: Path) -> None:
    file.write_bytes(batch_line())
    assert check_content(file, Purpose.BATCH) == ContentCheck(True)
    file.write_bytes(batch_line() + batch_line() + b"{}\n" * 200)
    details = check_content(file, Purpose.BATCH).details or ""
    assert details.startswith("line 2: custom_id 'a' occurs twice; line 3: ")
    assert details.endswith("and at least 80 more errors")


@pytest.mark.parametrize(
    ("error", "words"), [(MemoryError(), "4 GiB"), (sqlite3.OperationalError(), "too many problems")]
)
def test_check_that_exceeds_its_limits_marks_the_file_as_unusable(
    file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(path: Path) -> list[str]:
        raise error

    monkeypatch.setattr(content_check, "_training_problems", fail)
    check = check_content(file, Purpose.FINE_TUNE)
    assert not check.usable
    assert words in (check.details or "")
