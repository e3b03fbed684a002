"""The general questions: the set that comes with the package, or the user's own."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from svc.dataset.readers.reader import read_lines
from svc.dataset.schema.example import ChatExample
from svc.errors import DataError

SHIPPED = "general.jsonl"
MAX_TOKENS = 32
"""Longest answer: the questions want a word or a sentence."""
_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class GeneralSet:
    """Questions, and what is right.

    Attributes:
        name: of the file.
        examples: with a reference answer each.
        accepted: for each example the texts of which an answer must have one.
    """

    name: str
    examples: tuple[ChatExample, ...]
    accepted: tuple[tuple[str, ...], ...]

    @property
    def fingerprint(self) -> str:
        """Equal where the same is asked, and the same is right; as `sha256:<hex>`."""
        rows = [[example.as_dict(), texts] for example, texts in zip(self.examples, self.accepted, strict=True)]
        return f"sha256:{hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()}"

    def first(self, count: int | None) -> "GeneralSet":
        """So many of the first questions; None: all."""
        return GeneralSet(self.name, self.examples[:count], self.accepted[:count])


def shipped_general_set() -> GeneralSet:
    """The one of this package."""
    return read_general_set(Path(str(files("svc.evaluation.general") / SHIPPED)))


def read_general_set(path: Path) -> GeneralSet:
    """Reads a data file, of which JSON lines may say what is accepted.

    Raises:
        DataError: it cannot be read, a line is no example, or `accepted` is no list of texts.
    """
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path} holds no examples", expected="general questions with their answers")
    return GeneralSet(path.name, tuple(example for example, _ in rows), tuple(texts for _, texts in rows))


def _rows(path: Path) -> Iterator[tuple[ChatExample, tuple[str, ...]]]:
    with_accepted = path.suffix in _JSON_LINES
    for line in read_lines(path):
        if line.error:
            raise DataError(
                f"{path}:{line.number}: {line.error.wrong}",
                expected=line.error.expected,
                todo=f"run `svc data check {path}` for all problems",
            )
        if line.example:
            said = json.loads(line.raw).get("accepted") if with_accepted else None
            yield line.example, (line.example.answer,) if said is None else _accepted(path, line.number, said)


def _accepted(path: Path, number: int, said: Any) -> tuple[str, ...]:
    if isinstance(said, list) and said and all(isinstance(text, str) and text.strip() for text in said):
        return tuple(said)
    raise DataError(f"{path}:{number}: accepted is {said!r:.80}", expected="a list of texts, none of them blank")
