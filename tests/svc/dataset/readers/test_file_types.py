"""Tests that every file type yields the same examples, and that damage is reported at its line."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svc.dataset.problem.problem import Code
from svc.dataset.readers import file_types as parquet_module
from svc.dataset.readers import jsonl as jsonl_module
from svc.dataset.readers.file_types import CONTAINERS, is_data_file, read_rows
from svc.dataset.readers.reader import read_examples, read_lines, write_examples
from svc.dataset.readers.row import Row
from svc.dataset.schema.example import ChatExample
from tests.svc.chats import chat, write_lines

EXAMPLES = [chat(f"question {number}, “quoted”;\nand 日本\u2028 more", f"answer {number}") for number in range(300)]
VALUES: list[dict[str, Any]] = [example.as_dict() for example in EXAMPLES]


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)  # type: ignore[no-any-return]


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def jsonl(folder: Path) -> Path:
    write_examples(folder / "x.jsonl", EXAMPLES)
    return folder / "x.jsonl"


def table(path: Path, separator: str) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(["id", "instruction", "input", "output"])
        for number, example in enumerate(EXAMPLES):
            writer.writerow([number, example.question, "", example.answer])
    return path


def parquet(path: Path, values: list[dict[str, Any]] = VALUES) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path, row_group_size=100)
    return path


def written(folder: Path, kind: str) -> Path:
    match kind:
        case "jsonl":
            return jsonl(folder)
        case "list":
            (folder / "x.json").write_text(json.dumps(VALUES), "utf-8")
        case "indented":
            (folder / "x.json").write_text("\ufeff" + json.dumps(VALUES, indent=2, ensure_ascii=False), "utf-8")
        case "lines":
            jsonl(folder).rename(folder / "x.json")
        case "parquet":
            return parquet(folder / "x.parquet")
        case "messages":
            with (folder / "x.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([["messages"], *([json.dumps(value["messages"])] for value in VALUES)])
            return folder / "x.csv"
        case separator:
            return table(folder / "x.csv", separator)
    return folder / "x.json"


@pytest.mark.parametrize("kind", ["jsonl", "list", "indented", "lines", "parquet", "messages", ",", ";", "\t"])
def test_all_file_types_yield_the_same_examples(tmp_path: Path, kind: str) -> None:
    assert read_examples(written(tmp_path, kind)) == EXAMPLES


@pytest.mark.parametrize(("kind", "end"), zip(cycle(["jsonl", "indented", ","]), COMPRESS, strict=False))
def test_compressed_files_yield_the_same_examples_as_plain_files(tmp_path: Path, kind: str, end: str) -> None:
    plain = written(tmp_path, kind)
    packed = plain.with_name(plain.name + end)
    packed.write_bytes(COMPRESS[end](plain.read_bytes()))
    assert read_examples(packed) == EXAMPLES


@pytest.mark.parametrize("end", COMPRESS)
def test_truncated_compressed_file_yields_readable_rows_then_an_error(tmp_path: Path, end: str) -> None:
    content = COMPRESS[end](jsonl(tmp_path).read_bytes())
    packed = tmp_path / f"cut.jsonl{end}"
    packed.write_bytes(content[: len(content) // 2])
    *_, last = read_lines(packed)
    assert last.error is not None and last.error.code is Code.UNREADABLE


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl.gz", "x.jsonl.xz", "x.jsonl.bz2", "x.jsonl.zst"])
def test_file_whose_content_does_not_match_its_extension_is_unreadable(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such thing at all, but long enough for a header")
    (line,) = read_lines(tmp_path / name)
    assert line.error is not None and line.error.code is Code.UNREADABLE


def errors(path: Path) -> list[tuple[int, Code]]:
    return [(line.number, line.error.code) for line in read_lines(path) if line.error]


def test_invalid_json_list_element_is_reported_at_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([VALUES[0], {"messages": 3}, 7, VALUES[1]], indent=1))
    begin = path.read_text().splitlines().index('  "messages": 3')
    assert errors(path) == [(begin, Code.WRONG_FORMAT), (begin + 3, Code.WRONG_FORMAT)]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("[]", []),
        ("[1", [(1, Code.WRONG_FORMAT), (1, Code.NOT_JSON)]),
        ("[\n{]", [(2, Code.NOT_JSON)]),
        ("[GOOD,\nGOOD] x", [(2, Code.NOT_JSON)]),
        ("[GOOD\nGOOD]", [(2, Code.NOT_JSON)]),
        ('[GOOD,\n{"a": 1, "a": 2}, GOOD]', [(2, Code.NOT_JSON)]),
        ("[GOOD,\nNaN, GOOD]", [(2, Code.NOT_JSON)]),
        ("[" * 100_000, [(1, Code.NOT_JSON)]),
    ],
)
def test_errors_in_a_json_list_are_reported_with_line_numbers(
    tmp_path: Path, content: str, found: list[tuple[int, Code]]
) -> None:
    (tmp_path / "x.json").write_text(content.replace("GOOD", json.dumps(VALUES[0])))
    assert errors(tmp_path / "x.json") == found


def test_non_utf8_list_element_is_reported_and_reading_continues(tmp_path: Path) -> None:
    good = json.dumps(VALUES[0]).encode()
    (tmp_path / "x.json").write_bytes(b"[" + good + b",\n" + good.replace(b"answer", b"caf\xe9") + b",\n" + good + b"]")
    assert errors(tmp_path / "x.json") == [(2, Code.NOT_UTF8)]


def test_csv_errors_are_reported_at_the_first_line_of_the_record(tmp_path: Path) -> None:
    content = b'prompt,completion\n"a\nb",c\nonly one\nd,\nd,caf\xe9\n"e"x,f\n\ng,h\n'
    (tmp_path / "x.csv").write_bytes(content)
    wanted = [(4, Code.WRONG_FORMAT), (5, Code.WRONG_CONTENT), (6, Code.NOT_UTF8), (7, Code.WRONG_FORMAT)]
    assert errors(tmp_path / "x.csv") == wanted
    assert [line.number for line in read_lines(tmp_path / "x.csv") if line.example] == [2, 9]


def test_optional_fields_may_be_null_in_a_parquet_file(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "u", "name": "Ada"}, {"role": "assistant", "content": "a", "weight": 1}]
    path = parquet(tmp_path / "x.parquet", [{"messages": turns, "tools": None}, {"messages": VALUES[0]["messages"]}])
    first, second = read_examples(path)
    assert (first.messages[0].name, first.messages[1].weight, second) == ("Ada", 1, EXAMPLES[0])


def arrow_file(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize(
    "unused",
    [
        pyarrow.array([10**15] * 2, pyarrow.timestamp("s")),
        pyarrow.array([10**9] * 2, pyarrow.timestamp("s", tz="Mars/Base")),
        pyarrow.array([b"caf\xe9"] * 2).view(pyarrow.string()),
    ],
    ids=["beyond the year 9999", "unknown time zone", "not UTF-8"],
)
def test_content_of_an_unused_parquet_column_is_ignored(tmp_path: Path, unused: Any) -> None:
    path = arrow_file(tmp_path / "x.parquet", {"prompt": ["q", "r"], "completion": ["a", "b"], "unused": unused})
    assert [example.question for example in read_examples(path)] == ["q", "r"]


@pytest.mark.parametrize("zone", [None, "Mars/Base"])
def test_unreadable_parquet_value_is_reported_with_its_row_number(tmp_path: Path, zone: str | None) -> None:
    prompts = pyarrow.array([10**15], pyarrow.timestamp("s", tz=zone))
    path = arrow_file(tmp_path / "x.parquet", {"prompt": prompts, "completion": ["a"]})
    assert errors(path) == [(1, Code.WRONG_FORMAT)]


def test_error_for_a_parquet_file_in_an_unknown_format_lists_its_columns(tmp_path: Path) -> None:
    path = arrow_file(tmp_path / "x.parquet", {"question": ["q"], "answer": ["a"]})
    (line,) = read_lines(path)
    assert line.error is not None and line.error.code is Code.WRONG_FORMAT
    assert "['answer', 'question']" in line.error.wrong


def test_duplicate_column_is_an_error_only_if_its_field_is_used(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,completion,completion,note,note\nq,a,b,1,2\n")
    columns = [pyarrow.array([text]) for text in ("q", "a", "b")]
    names = ["prompt", "completion", "completion"]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=names), tmp_path / "x.parquet")
    assert errors(tmp_path / "x.csv") == [(2, Code.WRONG_FORMAT)]
    assert errors(tmp_path / "x.parquet") == [(1, Code.WRONG_FORMAT)]
    (tmp_path / "y.csv").write_text("prompt,completion,note,note\nq,a,1,2\n")
    assert errors(tmp_path / "y.csv") == []


@pytest.mark.parametrize("before", ["\n", " \r\n\n", "sep=;\r\n", '"sep=;"\n', "\nsep=;\n\n"])
def test_blank_lines_and_sep_lines_before_the_csv_header_are_skipped(tmp_path: Path, before: str) -> None:
    (tmp_path / "x.csv").write_bytes(f"{before}prompt;completion\nq, r;a\n".encode())
    (line,) = read_lines(tmp_path / "x.csv")
    assert line.example is not None and line.example.question == "q, r"
    assert line.number == before.count("\n") + 2


def test_oversized_parquet_row_is_reported_and_reading_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_module, "MAX_ROW_BYTES", 1_000)
    path = parquet(tmp_path / "x.parquet", [VALUES[0], chat("x" * 2_000).as_dict(), VALUES[1]])
    assert errors(path) == [(2, Code.TOO_LARGE)]
    assert read_lines_examples(path) == EXAMPLES[:2]


def test_oversized_line_is_reported_and_reading_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_module, "MAX_ROW_BYTES", 1_000)
    path = write_lines(tmp_path / "x.jsonl", VALUES[0], chat("x" * 2_000).as_dict(), VALUES[1])
    assert errors(path) == [(2, Code.TOO_LARGE)]
    assert read_lines_examples(path) == EXAMPLES[:2]


def read_lines_examples(path: Path) -> list[ChatExample]:
    return [line.example for line in read_lines(path) if line.example]


def test_reading_progress_is_monotonic_and_never_exceeds_the_file_size(tmp_path: Path) -> None:
    for path in (jsonl(tmp_path), parquet(tmp_path / "x.parquet")):
        told: list[int] = []
        assert sum(1 for _ in read_rows(path, told.append)) == len(EXAMPLES)
        assert told and told == sorted(told) and told[-1] <= path.stat().st_size


@pytest.mark.slow
@given(st.binary(max_size=200) | st.text(alphabet='[]{},:" \n\\u1xamesg\ufeff', max_size=60).map(str.encode))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bytes_in_any_file_type_yield_rows_or_errors(tmp_path: Path, content: bytes) -> None:
    for name in [f"x{end}" for end in CONTAINERS] + [f"x.jsonl{end}" for end in COMPRESS]:
        (tmp_path / name).write_bytes(content)
        rows: list[Row] = list(read_rows(tmp_path / name))
        assert [row.number for row in rows] == sorted(row.number for row in rows)


@pytest.mark.parametrize(
    ("name", "is_one"), [("a.jsonl", True), ("A.JSON.GZ", True), ("a.csv.zst", True), ("a.txt", False), ("a.gz", False)]
)
def test_data_files_are_recognized_by_extension(name: str, is_one: bool) -> None:
    assert is_data_file(Path(name)) is is_one
