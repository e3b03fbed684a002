"""From data files to chat examples, one problem per bad line and never a guess.

A file has one format, the one of most of its first rows; a row in another is an error.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.bad_lines import BadLines
from svc.dataset.readers.chat_formats import Format, parse_row, recognise
from svc.dataset.readers.file_types import read_rows
from svc.dataset.readers.row import Row
from svc.dataset.readers.source import data_files
from svc.dataset.schema.example import ChatExample, normal_prompt
from svc.errors import DataError

_HEAD_ROWS = 100
_HEAD_BYTES = 4 * 2**20
Source = str | Path


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file: an example, or what is wrong with it; both empty when it is blank.

    Attributes:
        number: from 1.
        raw: the line's bytes.
        fields: for each message of the example, where in the line its text stands.
    """

    number: int
    raw: bytes
    error: RowError | None
    example: ChatExample | None
    fields: tuple[str, ...]


def read_lines(path: Path, on_read: Callable[[int], None] = lambda position: None) -> Iterator[Line]:
    """Yields every line of a data file; memory is bounded by the longest line.

    Args:
        on_read: told from time to time how many bytes of the file were read.

    Raises:
        DataError: there is no such file, or it cannot be opened.
    """
    rows = read_rows(path, on_read)
    head: list[Row] = []
    while len(head) < _HEAD_ROWS and sum(len(row.raw) for row in head) < _HEAD_BYTES and (row := next(rows, None)):
        head.append(row)
    formats = Counter(form for row in head if (form := recognise(row.value)))
    # Chat if there is none; the first of two that are equally frequent.
    form = formats.most_common(1)[0][0] if formats else Format.CHAT
    for row in chain(head, rows):
        parsed: tuple[ChatExample | None, tuple[str, ...]] = (None, ())
        error = row.error
        if not (row.blank or error):
            try:
                parsed = parse_row(row.value, form)
            except RowError as fault:
                error = fault
        yield Line(row.number, row.raw, error, *parsed)


def read_examples(
    sources: Source | Sequence[Source],
    *,
    minimum: int = 1,
    cache: Path | None = None,
    bad_lines: BadLines | None = None,
    kept_back: Sequence[ChatExample] = (),
) -> list[ChatExample]:
    """All examples of one or more sources, in their order; the first bad line stops it.

    Args:
        sources: files, folders, or hub datasets as `hf:ORG/NAME`.
        minimum: fewest examples that are of use.
        cache: folder for what is fetched from the hub.
        bad_lines: takes the bad lines, which then stop nothing.
        kept_back: held-out examples; a line with the prompt of one is bad.

    Raises:
        DataError: a bad line, by number, or too few examples.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    held = {normal_prompt(example) for example in kept_back}
    examples: list[ChatExample] = []
    for path in chain.from_iterable(data_files(source, cache) for source in given):
        for line in read_lines(path):
            error = line.error
            if line.example and held and normal_prompt(line.example) in held:
                error = RowError(Code.LEAK, "a held-out example has the same prompt")
            if error:
                _refuse(path, line, error, bad_lines)
            elif line.example:
                examples.append(line.example)
    if len(examples) < minimum:
        raise DataError(
            f"{', '.join(map(str, given))} holds {len(examples)} example{'' if len(examples) == 1 else 's'}",
            expected=f"at least {minimum}",
            todo="add examples; a few hundred are where fine-tuning begins to pay",
        )
    return examples


def write_examples(path: Path, examples: Iterable[ChatExample]) -> None:
    """Writes examples as JSONL in UTF-8."""
    lines = (json.dumps(example.as_dict(), ensure_ascii=False) + "\n" for example in examples)
    path.write_text("".join(lines), "utf-8")


def _refuse(path: Path, line: Line, error: RowError, bad_lines: BadLines | None) -> None:
    todo = f"run `svc data check {path}` for all problems, and fix or remove those lines; or train with --skip-bad"
    if error.code is Code.UNREADABLE:  # not a bad line: nobody knows how many examples are missing
        todo = error.todo
    elif bad_lines is not None:
        bad_lines.add(path, line.number, line.raw, error)
        return
    raise DataError(f"{path}:{line.number}: {error.wrong}", expected=error.expected, todo=todo) from error
