"""Tests that a data file is read line by line, with any bytes becoming examples or reports."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.dataset.readers.reader import read_examples, read_lines, write_examples
from svc.dataset.text.plain_text import is_blank
from svc.errors import DataError
from tests.published_examples import published
from tests.svc.chats import chat, write_lines

GOOD = json.dumps(chat().as_dict()).encode()


def failure(path: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read_examples(path, **options)
    assert caught.value.todo
    return caught.value


def test_missing_file_error_names_the_file(tmp_path: Path) -> None:
    error = failure(tmp_path / "train.jsonl")
    assert f"cannot open data file {tmp_path / 'train.jsonl'}: No such file" in error.wrong
    assert "check the path" in error.todo


def test_error_for_a_folder_without_data_files_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    assert f"the folder {tmp_path} contains no data files" in failure(tmp_path).wrong


def test_line_without_a_user_turn_is_skipped_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "published.jsonl"
    path.write_text(published(toy=4))
    assert len(read_examples(path)) == 3
    assert "published.jsonl: 1 line skipped (no_user_turn)" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_empty_file_raises_too_few_examples(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    error = failure(path)
    assert f"found only 0 examples in {path}" in error.wrong
    assert error.expected == "at least 1"


def test_single_example_is_too_few_for_training(tmp_path: Path) -> None:
    error = failure(write_lines(tmp_path / "one.jsonl", chat().as_dict()), minimum=2)
    assert "found only 1 example in" in error.wrong
    assert error.expected == "at least 2"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"messages": [', "invalid JSON"),
        (b'{"messages": [{"role": "user", "content": "caf\xe9"}]}', "byte 0xe9 at position 46 is not valid UTF-8"),
        (b'{"messages": [{"role": "user", "content": "Which?"}]}', "no assistant turn"),
        (b'{"messages": [], "messages": []}', "duplicate key 'messages'"),
        (b'{"weight": NaN}', "invalid JSON: NaN"),
        (b'{"weight": ' + b"9" * 5000 + b"}", "a number with too many digits"),
        (b"[" * 100_000, "nested too deeply"),
        (GOOD + GOOD, "invalid JSON: Extra data"),
    ],
)
def test_invalid_line_error_names_the_line_and_suggests_svc_data_check(tmp_path: Path, line: bytes, text: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD)
    error = failure(path)
    assert error.wrong.startswith(f"{path}:3: ")
    assert text in error.wrong
    assert error.expected
    assert f"svc data check {path}" in error.todo


@pytest.mark.slow
def test_json_object_reading_time_is_linear_in_the_number_of_keys(tmp_path: Path) -> None:
    keys = [f'"{number}": 1' for number in range(100_000)]
    path = tmp_path / "train.jsonl"
    path.write_text("{" + ", ".join([*keys, keys[500]]) + "}")
    began = time.process_time()
    assert "duplicate key '500'" in failure(path).wrong
    assert time.process_time() - began < 5


def test_byte_order_mark_and_windows_line_endings_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD + b"\r\n")
    assert read_examples(path) == [chat(), chat()]


def test_only_line_feeds_are_treated_as_line_separators(tmp_path: Path) -> None:
    example = chat(user="one\u2028two\x85three\u2029")
    write_examples(tmp_path / "x.jsonl", [example, chat()])
    assert read_examples(tmp_path / "x.jsonl") == [example, chat()]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: not is_blank(text))


@pytest.mark.slow
@given(st.lists(st.builds(chat, texts, texts), min_size=1, max_size=5))
def test_examples_are_unchanged_after_being_written_to_a_file_and_read_back(
    tmp_path_factory: pytest.TempPathFactory, examples: list[Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    write_examples(path, examples)
    assert read_examples(path) == examples


pieces = st.binary(max_size=40) | st.sampled_from([GOOD, b"\n", b"\r\n", b'{"messages":', b"\xef\xbb\xbf", b"[]"])


@pytest.mark.slow
@given(st.lists(pieces, max_size=12).map(b"".join))
def test_arbitrary_bytes_yield_examples_or_error_reports(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    lines = list(read_lines(path))
    assert [line.number for line in lines] == list(range(1, content.count(b"\n") + (content[-1:] not in b"\n") + 1))
    assert all(line.error is None or line.example is None for line in lines)
