"""Reads the general questions, which are either the set that comes with the package or the user's own."""

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
"""Maximum number of tokens in an answer. The questions can be answered with a word or a sentence."""
_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class GeneralSet:
    """A set of general questions and their accepted answers.

    Attributes:
        name: name of the file.
        examples: the questions, each with a reference answer.
        accepted: accepted texts for each example. An answer is right if it contains one of them.
    """

    name: str
    examples: tuple[ChatExample, ...]
    accepted: tuple[tuple[str, ...], ...]

    @property
    def fingerprint(self) -> str:
        """Digest of the questions and accepted answers, as `sha256:<hex>`."""
        rows = [[example.as_dict(), texts] for example, texts in zip(self.examples, self.accepted, strict=True)]
        return f"sha256:{hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()}"

    def first(self, count: int | None) -> "GeneralSet":
        """Return a set with the first `count` questions, or with all of them if `count` is None."""
        return GeneralSet(self.name, self.examples[:count], self.accepted[:count])


def shipped_general_set() -> GeneralSet:
    """Return the set of general questions that comes with this package."""
    return read_general_set(Path(str(files("svc.evaluation.general") / SHIPPED)))


def read_general_set(path: Path) -> GeneralSet:
    """Read general questions from a data file. In JSON Lines, a row may list accepted texts under the key `accepted`.

    Raises:
        DataError: the file cannot be read, a line is not an example, or `accepted` is not a list of texts.
    """
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path} has no examples", expected="general questions with their answers")
    return GeneralSet(path.name, tuple(example for example, _ in rows), tuple(texts for _, texts in rows))


def _rows(path: Path) -> Iterator[tuple[ChatExample, tuple[str, ...]]]:
    with_accepted = path.suffix in _JSON_LINES
    for line in read_lines(path):
        if line.error:
            raise DataError(
                f"{path}:{line.number}: {line.error.wrong}",
                expected=line.error.expected,
                todo=f"run `svc data check {path}` to list all problems",
            )
        if line.example:
            accepted = json.loads(line.raw).get("accepted") if with_accepted else None
            yield line.example, (line.example.answer,) if accepted is None else _texts(path, line.number, accepted)


def _texts(path: Path, number: int, accepted: Any) -> tuple[str, ...]:
    if isinstance(accepted, list) and accepted and all(isinstance(text, str) and text.strip() for text in accepted):
        return tuple(accepted)
    raise DataError(
        f"{path}:{number}: `accepted` is not a list of strings: {accepted!r:.80}",
        expected="a list of non-blank strings",
    )
