"""Reads chat examples from JSONL, one problem per bad line and never a guess.

Lines end at the LF byte alone: `str.splitlines` also breaks at U+2028, which is good JSON.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svc.dataset.example import ChatExample, parse_example
from svc.errors import DataError


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file: an example, or what is wrong with it; both empty when it is blank.

    Attributes:
        number: from 1.
    """

    number: int
    example: ChatExample | None = None
    error: DataError | None = None


def read_lines(path: Path) -> Iterator[Line]:
    """Yields every line of a JSONL file; memory is bounded by the longest line.

    Raises:
        DataError: there is no such file, or it cannot be opened.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(
            f"cannot open data file {path}: {error.strerror}",
            expected="a JSONL file of chat examples",
            todo="check the path; paths in a recipe are relative to the recipe",
        ) from error
    with file:
        for number, raw in enumerate(file, start=1):
            content = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if not content.strip():
                yield Line(number)
                continue
            try:
                yield Line(number, example=parse_example(_decode(content)))
            except DataError as error:
                yield Line(number, error=error)


def read_examples(path: Path, *, minimum: int = 1) -> list[ChatExample]:
    """All examples of a file; the first bad line stops it.

    Args:
        minimum: fewest examples that are of use.

    Raises:
        DataError: a bad line, by number, or too few examples.
    """
    examples: list[ChatExample] = []
    for line in read_lines(path):
        if line.error:
            raise DataError(
                f"{path}:{line.number}: {line.error.wrong}",
                expected=line.error.expected,
                todo=f"run `svc data check {path}` for all problems, and mend or drop those lines",
            ) from line.error
        if line.example:
            examples.append(line.example)
    if len(examples) < minimum:
        raise DataError(
            f"{path} holds {len(examples)} example{'' if len(examples) == 1 else 's'}",
            expected=f"at least {minimum}",
            todo="add examples; a few hundred are where fine-tuning begins to pay",
        )
    return examples


def write_examples(path: Path, examples: Iterable[ChatExample]) -> None:
    """Writes examples as JSONL in UTF-8."""
    lines = (json.dumps(example.as_dict(), ensure_ascii=False) + "\n" for example in examples)
    path.write_text("".join(lines), "utf-8")


def _decode(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte 0x{raw[error.start]:02x} at position {error.start} is not UTF-8", expected="text in UTF-8"
        ) from error
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON: {error.msg} at column {error.colno}", expected="one JSON object in a line"
        ) from error
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise DataError(
            "not usable JSON: a number with too many digits", expected="one JSON object in a line"
        ) from error
    except RecursionError as error:
        raise DataError("not usable JSON: nested too deeply", expected="one JSON object in a line") from error


def _refuse_constant(name: str) -> Any:
    raise DataError(f"not JSON: {name}", expected="JSON knows no NaN and no Infinity")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else set()
    if twice:
        raise DataError(f"key {min(twice)!r} twice in one object", expected="each key once")
    return dict(pairs)
