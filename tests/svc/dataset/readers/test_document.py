"""Tests that documents without turns are read from text files and from rows with a text."""

import json
from pathlib import Path

import pytest

from svc.dataset.problem.problem import Code
from svc.dataset.readers.reader import read_examples, read_lines, write_examples
from svc.dataset.readers.source import data_files
from svc.dataset.schema.example import ChatExample, normal_prompt
from svc.errors import DataError
from tests.svc.chats import turn, write_lines
from tests.svc.dataset.rows import check_file
from trainer.data.split import group_near_duplicates, split_heldout

LICENCE = Path(__file__).parents[4] / "LICENSE"
TEXT = "It is a truth universally acknowledged,\n  that a single man in possession of a good fortune\u2028 …\n"


def texts(path: Path) -> list[str]:
    examples = read_examples(path)
    assert all(example.is_document for example in examples)
    return [example.question for example in examples]


@pytest.mark.parametrize("name", ["book.txt", "book.md", "BOOK.TXT"])
def test_text_file_is_one_document_with_its_exact_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\ufeff" + TEXT, "utf-8")
    assert texts(tmp_path / name) == [TEXT]


def test_each_row_with_a_text_field_is_read_as_a_document(tmp_path: Path) -> None:
    rows = [{"text": TEXT, "meta": 1}, {"text": " other"}]
    assert texts(write_lines(tmp_path / "c4.jsonl", *rows)) == [TEXT, " other"]


def test_documents_round_trip_through_a_file(tmp_path: Path) -> None:
    examples = read_examples(write_lines(tmp_path / "one.jsonl", {"text": TEXT}))
    write_examples(tmp_path / "two.jsonl", examples)
    assert json.loads((tmp_path / "two.jsonl").read_text("utf-8")) == {"text": TEXT}
    assert read_examples(tmp_path / "two.jsonl") == examples


def test_text_file_that_begins_like_jsonl_is_read_as_jsonl(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "chat.txt", {"messages": [turn("user", "a"), turn("assistant", "b")]})
    assert not read_examples(path)[0].is_document


def test_chat_row_may_also_have_a_text_field(tmp_path: Path) -> None:
    rows = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "text": "a b"}
    assert read_examples(write_lines(tmp_path / "x.jsonl", rows))[0].answer == "b"


def test_text_files_in_a_folder_are_used_only_if_it_contains_no_data_files(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt", "README.md", "c.png"):
        (tmp_path / name).write_text("text")
    assert [path.name for path in data_files(tmp_path)] == ["a.txt", "b.md"]
    (tmp_path / "data.jsonl").touch()
    assert [path.name for path in data_files(tmp_path)] == ["data.jsonl"]


@pytest.mark.parametrize(
    ("content", "code"), [(b"\xff\xfe\x00", Code.NOT_UTF8), (b"x" * (2**24 + 1), Code.TOO_LARGE)], ids=["bytes", "size"]
)
def test_unreadable_document_is_reported(tmp_path: Path, content: bytes, code: Code) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    [line] = read_lines(tmp_path / "x.txt")
    assert line.error and line.error.code is code


@pytest.mark.parametrize("text", ["", "  \n", 3, None])
def test_document_row_with_an_invalid_text_field_is_an_error(tmp_path: Path, text: object) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"text": "a"}, {"text": text})
    with pytest.raises(DataError, match=r"x.jsonl:2: "):
        read_examples(path)


def test_data_check_reports_duplicate_documents_but_never_overlong_documents(tmp_path: Path) -> None:
    licence = LICENCE.read_text("utf-8")
    rows = [{"text": licence}, {"text": licence + " "}, {"text": licence.replace("Licen", "Lizen", 3)}, {"text": TEXT}]
    report = check_file(write_lines(tmp_path / "x.jsonl", *rows))
    assert (report.documents, report.problems.errors) == (4, 0)
    assert [(each.line, each.code) for each in report.problems] == [(2, Code.DUPLICATE), (3, Code.NEAR_DUPLICATE)]


def test_copies_of_a_document_are_not_split_between_training_and_heldout_sets(tmp_path: Path) -> None:
    rows = [{"text": f"Document {number}: {TEXT}"} for number in range(200)]
    examples = read_examples(write_lines(tmp_path / "x.jsonl", *rows, *rows[:50]))
    split = split_heldout(examples, 0.2, 0)
    prompts: tuple[set[str], ...] = tuple(set(map(normal_prompt, part)) for part in (split.train, split.heldout))
    assert 20 < len(prompts[1]) < 70
    assert prompts[0].isdisjoint(prompts[1])
    assert len(set(group_near_duplicates(examples).tolist())) == 200


def test_document_example_has_its_text_as_both_question_and_answer() -> None:
    example = ChatExample.of_document("a b")
    assert (example.question, example.answer, example.learnt) == ("a b", "a b", (1,))
