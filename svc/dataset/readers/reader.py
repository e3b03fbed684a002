"""Reads chat examples and preferences from data files, reporting one problem for each bad line.

A file has a single format, which is determined by the majority of its first rows. A row in any other format
is an error.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

from svc.dataset.problem.problem import Code, RowError, Severity, severity_of
from svc.dataset.readers.bad_lines import BadLines
from svc.dataset.readers.chat_formats import Format, parse_row, recognise
from svc.dataset.readers.file_types import read_rows
from svc.dataset.readers.preference_formats import PairFormat, is_labeled, recognise_pair
from svc.dataset.readers.row import Row
from svc.dataset.readers.source import data_files
from svc.dataset.schema.example import ChatExample, answered_prompts, normal_prompt
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from svc.dataset.stored_examples import collect
from svc.errors import DataError
from svc.terminal import console

_HEAD_ROWS = 100
_HEAD_BYTES = 4 * 2**20
Source = str | Path
AnyExample = ChatExample | PreferencePair | LabeledAnswer
Example = TypeVar("Example", bound=AnyExample, covariant=True)
OnRead = Callable[[int], None]


class Kind(StrEnum):
    """Kind of examples in a data file."""

    CHAT = "chat examples"
    PAIRS = "preference pairs"
    LABELED = "labeled answers"


_DEFAULTS: dict[Kind | None, tuple[Kind, Format | PairFormat]] = {
    None: (Kind.CHAT, Format.CHAT),
    Kind.CHAT: (Kind.CHAT, Format.CHAT),
    Kind.PAIRS: (Kind.PAIRS, PairFormat.CHOSEN_REJECTED),
    Kind.LABELED: (Kind.LABELED, Format.PROMPT_COMPLETION),
}
"""What to assume about a file if none of its first rows are in a known format: the kind and format of its examples,
keyed by the kind that the caller requires (None for any)."""
_OBJECTIVES = {
    Kind.CHAT: "remove `objective` from the recipe, or set `objective: sft`",
    Kind.PAIRS: "set `objective: dpo`, `objective: orpo` or `objective: kto` in the recipe",
    Kind.LABELED: "set `objective: kto` in the recipe",
}


@dataclass(frozen=True, slots=True)
class Line(Generic[Example]):
    """One line of a data file, with the example or the error that parsing it produced. A blank line has neither.

    Attributes:
        number: line number, starting at 1.
        raw: the line's bytes.
        fields: path, within the line, to the text of each message of the example. For a pair, this covers the
            messages of the chosen example and the rejected answer.
    """

    number: int
    raw: bytes
    error: RowError | None
    example: Example | None
    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A data file whose first rows have been read to determine the kind and format of its examples."""

    kind: Kind
    form: Any
    rows: Iterator[Row]

    def lines(self, parse: Callable[[Any, Any], tuple[Example, tuple[str, ...]]]) -> Iterator[Line[Example]]:
        """Yield every line of the file.

        Args:
            parse: function that converts a row in the file's format to an example and the names of its fields.
        """
        for row in self.rows:
            parsed: tuple[Example | None, tuple[str, ...]] = (None, ())
            error = row.error
            if not (row.blank or error):
                try:
                    parsed = parse(row.value, self.form)
                except RowError as fault:
                    error = fault
            yield Line(row.number, row.raw, error, *parsed)


def open_file(path: Path, expected: Kind | None, on_read: OnRead = lambda position: None) -> OpenFile:
    """Open a data file, and determine the kind and format of its examples from its first rows.

    Memory is bounded by the longest line.

    Args:
        expected: the required kind, or None for any. Rows that are both chat examples and pairs, as in UltraFeedback,
            are read as chat examples only if chat examples are expected.
        on_read: called at intervals with the number of bytes of the file read so far.

    Raises:
        DataError: the file does not exist, or it cannot be opened.
    """
    rows = read_rows(path, on_read)
    head: list[Row] = []
    while len(head) < _HEAD_ROWS and sum(len(row.raw) for row in head) < _HEAD_BYTES and (row := next(rows, None)):
        head.append(row)
    found = Counter(known for row in head if (known := _recognise(row.value, expected)))
    # Of two equally frequent formats, the first one.
    kind, form = found.most_common(1)[0][0] if found else _DEFAULTS[expected]
    return OpenFile(kind, form, chain(head, rows))


def _recognise(value: Any, expected: Kind | None) -> tuple[Kind, Format | PairFormat] | None:
    pair, chat = recognise_pair(value), recognise(value)
    if pair and not (chat and expected is Kind.CHAT):
        return Kind.PAIRS, pair
    if chat:
        return Kind.LABELED if is_labeled(value) else Kind.CHAT, chat
    return None


def wrong_kind(path: Path, kind: Kind, expected: Kind) -> DataError:
    """Return the error for a file whose examples are not of the expected kind."""
    todo = f"to train on this file, {_OBJECTIVES[kind]}; otherwise, provide a file of {expected} (docs/data.md)"
    return DataError(f"{path} contains {kind}", expected=f"{expected}", todo=todo)


def read_lines(path: Path, on_read: OnRead = lambda position: None) -> Iterator[Line[ChatExample]]:
    """Yield every line of a file of chat examples.

    Args:
        on_read: called at intervals with the number of bytes of the file read so far.

    Raises:
        DataError: the file does not exist, it cannot be opened, or it contains preferences.
    """
    file = open_file(path, Kind.CHAT, on_read)
    if file.kind is not Kind.CHAT:
        raise wrong_kind(path, file.kind, Kind.CHAT)
    yield from file.lines(parse_row)


def read_examples(
    sources: Source | Sequence[Source],
    *,
    minimum: int = 1,
    cache: Path | None = None,
    bad_lines: BadLines | None = None,
    kept_back: Sequence[ChatExample] = (),
) -> Sequence[ChatExample]:
    """Return all chat examples from one or more sources, in order.

    If there are too many examples for memory, they are stored in a temporary file.

    Args:
        sources: files, folders, or hub datasets given as `hf:ORG/NAME`.
        minimum: minimum number of examples required.
        cache: folder for files fetched from the hub.
        bad_lines: collects bad lines, or None to raise an error for the first bad line.
        kept_back: held-out examples; a line that repeats one of their prompts is bad.

    Raises:
        DataError: a line is bad (the error names it), a file contains preferences, or there are too few
            examples.
    """
    examples = collect(read_good(read_lines, sources, cache, bad_lines, kept_back))
    require(minimum, examples, "example", sources)
    return examples


def read_good(
    read: Callable[[Path], Iterator[Line[Example]]],
    sources: Source | Sequence[Source],
    cache: Path | None,
    bad_lines: BadLines | None,
    kept_back: Sequence[ChatExample],
) -> Iterator[Example]:
    """Yield the examples of all lines that are not bad. See `read_examples` for the arguments.

    Args:
        read: function that yields the lines of a file.

    Raises:
        DataError: a line is bad, and `bad_lines` is None.
    """
    held = {normal_prompt(example) for example in kept_back}
    for path in chain.from_iterable(data_files(source, cache) for source in listed(sources)):
        skipped = Counter[Code]()
        for line in read(path):
            error = line.error
            if line.example and held and not held.isdisjoint(answered_prompts(chat_of(line.example))):
                error = RowError(Code.LEAK, "a held-out example has the same prompt")
            if error and bad_lines is None and severity_of(error.code) is Severity.WARNING:
                skipped[error.code] += 1
            elif error:
                _refuse(path, line, error, bad_lines)
            elif line.example:
                yield line.example
        for code, count in skipped.items():
            message = f"{path}: {count} line{'s' if count > 1 else ''} skipped ({code}); see `svc data check`"
            console.print(message, style="yellow", markup=False, soft_wrap=True)


def require(minimum: int, examples: Sequence[AnyExample], noun: str, sources: Source | Sequence[Source]) -> None:
    """Raise DataError if there are too few examples.

    Args:
        noun: singular noun for the examples, used in the message.
        sources: sources of the examples, named in the message.
    """
    if len(examples) < minimum:
        raise DataError(
            f"found only {len(examples)} {noun}{'' if len(examples) == 1 else 's'} in "
            f"{', '.join(map(str, listed(sources)))}",
            expected=f"at least {minimum}",
            todo="add examples; fine-tuning usually needs a few hundred",
        )


def listed(sources: Source | Sequence[Source]) -> list[Source]:
    """Return one or more sources as a list."""
    return [sources] if isinstance(sources, str | Path) else list(sources)


def chat_of(example: AnyExample) -> ChatExample:
    """Return an example's prompt and answer as a chat example. For a pair, the answer is the chosen one."""
    match example:
        case PreferencePair():
            return example.chosen
        case LabeledAnswer():
            return example.example
        case _:
            return example


def write_examples(path: Path, examples: Iterable[ChatExample]) -> None:
    """Write examples as UTF-8 JSONL."""
    lines = (json.dumps(example.as_dict(), ensure_ascii=False) + "\n" for example in examples)
    path.write_text("".join(lines), "utf-8")


def _refuse(path: Path, line: Line[Example], error: RowError, bad_lines: BadLines | None) -> None:
    todo = f"run `svc data check {path}` to list all problems and fix or remove those lines, or train with --skip-bad"
    if error.code is Code.UNREADABLE:  # not a bad line: the number of missing examples is unknown
        todo = error.todo
    elif bad_lines is not None:
        bad_lines.add(path, line.number, line.raw, error)
        return
    raise DataError(f"{path}:{line.number}: {error.wrong}", expected=error.expected, todo=todo) from error
