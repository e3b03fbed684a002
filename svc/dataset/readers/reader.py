"""Reads chat examples from data files, reporting one problem for each bad line.

A file has a single format, which is determined by the majority of its first rows. A row in any other format
is an error.
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
from svc.dataset.schema.example import ChatExample, answered_prompts, normal_prompt
from svc.errors import DataError

_HEAD_ROWS = 100
_HEAD_BYTES = 4 * 2**20
Source = str | Path


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a data file, parsed to an example or an error. A blank line has neither.

    Attributes:
        number: line number, starting at 1.
        raw: the line's bytes.
        fields: for each message of the example, the field of the line that its text came from.
    """

    number: int
    raw: bytes
    error: RowError | None
    example: ChatExample | None
    fields: tuple[str, ...]


def read_lines(path: Path, on_read: Callable[[int], None] = lambda position: None) -> Iterator[Line]:
    """Yield every line of a data file. Memory is bounded by the longest line.

    Args:
        on_read: called at intervals with the number of bytes of the file read so far.

    Raises:
        DataError: the file does not exist or cannot be opened.
    """
    rows = read_rows(path, on_read)
    head: list[Row] = []
    while len(head) < _HEAD_ROWS and sum(len(row.raw) for row in head) < _HEAD_BYTES and (row := next(rows, None)):
        head.append(row)
    formats = Counter(form for row in head if (form := recognise(row.value)))
    # Default: chat. Of two equally frequent formats, the first one.
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
    """Return all examples from one or more sources, in order.

    Args:
        sources: files, folders, or hub datasets given as `hf:ORG/NAME`.
        minimum: minimum number of examples required.
        cache: folder for files fetched from the hub.
        bad_lines: collects bad lines, or None to raise an error for the first bad line.
        kept_back: held-out examples; a line that repeats one of their prompts is bad.

    Raises:
        DataError: a line is bad (the error names it), or there are too few examples.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    held = {normal_prompt(example) for example in kept_back}
    examples: list[ChatExample] = []
    for path in chain.from_iterable(data_files(source, cache) for source in given):
        for line in read_lines(path):
            error = line.error
            if line.example and held and not held.isdisjoint(answered_prompts(line.example)):
                error = RowError(Code.LEAK, "a held-out example has the same prompt")
            if error:
                _refuse(path, line, error, bad_lines)
            elif line.example:
                examples.append(line.example)
    if len(examples) < minimum:
        raise DataError(
            f"found only {len(examples)} example{'' if len(examples) == 1 else 's'} in {', '.join(map(str, given))}",
            expected=f"at least {minimum}",
            todo="add examples; fine-tuning usually needs a few hundred",
        )
    return examples


def write_examples(path: Path, examples: Iterable[ChatExample]) -> None:
    """Write examples as UTF-8 JSONL."""
    lines = (json.dumps(example.as_dict(), ensure_ascii=False) + "\n" for example in examples)
    path.write_text("".join(lines), "utf-8")


def _refuse(path: Path, line: Line, error: RowError, bad_lines: BadLines | None) -> None:
    todo = f"run `svc data check {path}` to list all problems and fix or remove those lines, or train with --skip-bad"
    if error.code is Code.UNREADABLE:  # not a bad line: the number of missing examples is unknown
        todo = error.todo
    elif bad_lines is not None:
        bad_lines.add(path, line.number, line.raw, error)
        return
    raise DataError(f"{path}:{line.number}: {error.wrong}", expected=error.expected, todo=todo) from error
