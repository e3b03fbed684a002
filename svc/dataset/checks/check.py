"""What is wrong with data files, line by line, before any model is loaded.

Errors are lines that cannot be trained on. Warnings are lines that can, and that a person should look at. Files are
streamed: of each example some 200 bytes stay in memory, never its text; what needs all of them (copies, leaks, labels)
is found at the end.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svc.dataset.checks.base_tokenizer import BaseTokenizer
from svc.dataset.checks.labels import FEW_ANSWERS, few_labels, look_at_answer, odd_answers
from svc.dataset.checks.line_table import LineTable, LineTableBuilder, Rows, first_with_same
from svc.dataset.checks.minhash import clusters, nearest, places_in
from svc.dataset.checks.text_checks import TextChecks
from svc.dataset.problem.problem import Code, RowError
from svc.dataset.problem.problem_log import ProblemLog
from svc.dataset.readers.reader import Line, read_lines
from svc.dataset.schema.example import ChatExample, Role, normal_prompt

MAX_LENGTH = 4096
"""Tokens from which on an example is called too long, when the caller does not say."""
_BYTES_A_TOKEN = 4.2  # English under a byte-level BPE of 49,152 entries; other languages have fewer
_LONG_ANSWER = 200

OnRead = Callable[[int], None]


@dataclass(slots=True)
class DataReport:
    """What a file holds.

    Attributes:
        lengths: characters of each good example, all texts together.
        tokens: of each good example; empty where they were not counted.
        answers: how often each final answer occurs; not counted any more once they are too many to be labels.
    """

    file: str
    lines: int = 0
    examples: int = 0
    lengths: "array[int]" = field(default_factory=lambda: array("I"))
    tokens: "array[int]" = field(default_factory=lambda: array("I"))
    answers: Counter[str] = field(default_factory=Counter)
    problems: ProblemLog = field(default_factory=ProblemLog)

    @property
    def median_characters(self) -> int:
        """Median length of an example, characters; 0 when there is none."""
        return _median(self.lengths)

    @property
    def median_tokens(self) -> int:
        """Median length of an example, tokens; 0 where they were not counted."""
        return _median(self.tokens)

    @property
    def labels(self) -> dict[str, int] | None:
        """Answers by frequency if there are few different ones, else None."""
        return few_labels(self.answers, self.examples) or None

    def add(self, line: int, code: Code, message: str, where: str = "") -> None:
        """Add one problem."""
        self.problems.add(self.file, line, code, message, where)


def _median(lengths: "array[int]") -> int:
    return round(float(np.median(np.frombuffer(lengths, np.uint32)))) if lengths else 0


def check_files(
    paths: Sequence[Path],
    heldout: Sequence[Path] = (),
    *,
    max_length: int = MAX_LENGTH,
    base: BaseTokenizer | None = None,
    on_read: OnRead = lambda position: None,
) -> list[DataReport]:
    """Reads all files and reports every problem.

    Args:
        paths: what is to be trained on, together.
        heldout: examples that must not stand in them: training on these makes every later figure a lie.
        max_length: tokens that an example may have.
        base: counts tokens, and has special tokens beside the known ones; without it tokens are estimated.
        on_read: told how many bytes of all files were read so far.

    Returns:
        One report for each of the paths, then one for each held-out file, in which examples are not compared.

    Raises:
        DataError: a file that cannot be opened.
    """
    reports = [DataReport(file=str(path)) for path in (*heldout, *paths)]
    checks = _LineChecks(max_length, base)
    table, read, held = LineTableBuilder(), 0, 0
    for index, (path, report) in enumerate(zip((*heldout, *paths), reports, strict=True)):
        before, last = read, 1
        for line in read_lines(path, lambda position, before=before: on_read(before + position)):  # type: ignore[misc]
            checks.check(report, line)
            last = line.number
            if line.example:
                table.add(index, line.number, line.example, look_at_answer(line.example))
        if not report.examples:
            report.add(last, Code.EMPTY, "no example in the whole file")
        read += path.stat().st_size
        held = len(table) if index < len(heldout) else held
    _compare(reports, table.finish(), held)
    return [*reports[len(heldout) :], *reports[: len(heldout)]]


def shared_prompts(examples: Sequence[ChatExample], others: Sequence[ChatExample]) -> list[int]:
    """Indices of the examples whose prompt is also that of another one, spacing and case aside."""
    prompts = {normal_prompt(other) for other in others}
    return [index for index, example in enumerate(examples) if normal_prompt(example) in prompts]


class _LineChecks:
    """Checks that need one line only."""

    def __init__(self, max_length: int, base: BaseTokenizer | None) -> None:
        self._max_length = max_length
        self._base = base
        self._text = TextChecks(base.special_tokens if base else ()).problems
        self._shared_text = lru_cache(maxsize=64)(self._text)  # one system turn stands in all lines

    def check(self, report: DataReport, line: Line) -> None:
        report.lines += 1
        if error := line.error:
            wrong = f"{error.wrong}; expected {error.expected}" if error.expected else error.wrong
            report.add(line.number, error.code, wrong, error.field)
        elif line.example is None:
            report.add(line.number, Code.BLANK, "blank line, skipped")
        else:
            self._check_example(report, line, line.example)

    def _check_example(self, report: DataReport, line: Line, example: ChatExample) -> None:
        report.examples += 1
        report.lengths.append(min(example.characters, 2**32 - 1))
        if len(report.answers) <= FEW_ANSWERS:  # with more they are free text
            report.answers[example.answer[:_LONG_ANSWER]] += 1
        before = None
        for message, where in zip(example.messages, line.fields, strict=True):
            check = self._shared_text if message.role is Role.SYSTEM else self._text
            for code, text in check(message.content):
                report.add(line.number, code, f"{where} {text}", where)
            turn = where.removesuffix(".content")
            shown = [("name", message.name or "")]
            shown += [("call", f"{call.name} {call.arguments}") for call in message.tool_calls]
            for kind, content in shown:
                for code, text in self._text(content):
                    report.add(line.number, code, f"{turn} {text} of a {kind}", turn)
            if message.role is before and message.role in (Role.USER, Role.ASSISTANT):
                report.add(line.number, Code.SAME_ROLE_TWICE, f"{where}: two {before} turns in a row", where)
            if message.role is Role.ASSISTANT and before in (None, Role.SYSTEM):
                report.add(line.number, Code.ASSISTANT_FIRST, f"{where}: an assistant turn before any user turn", where)
            before = message.role
        for place, tool in enumerate(example.tools):
            for code, text in self._shared_text(tool):
                report.add(line.number, code, f"tools[{place}] {text}", f"tools[{place}]")
        self._check_length(report, line.number, example)

    def _check_length(self, report: DataReport, number: int, example: ChatExample) -> None:
        if self._base is None:
            tokens, about = round(example.utf8_bytes / _BYTES_A_TOKEN), "about "
        else:
            try:
                tokens, about = self._base.count(example), ""
            except RowError as error:
                report.add(number, error.code, error.wrong)
                return
            report.tokens.append(tokens)
        if tokens > self._max_length:
            report.add(number, Code.TOO_LONG, _too_long(example, tokens, about, self._max_length))


def _too_long(example: ChatExample, tokens: int, about: str, limit: int) -> str:
    characters = example.characters
    over = round(characters * (1 - limit / tokens))
    lost = "the whole answer among them" if over >= len(example.answer) else "all in the answer"
    text = f"{characters} characters, {about}{tokens} tokens, where {limit} are the maximum"
    return f"{text}: the last {over} characters would be cut, {lost}"


def _compare(reports: list[DataReport], table: LineTable, held: int) -> None:
    """Report what needs all lines: copies, leaks, odd answers.

    Args:
        held: so many of the first examples are the held-out ones.
    """
    train = table.rows[held:]
    odd: dict[int, tuple[Code, str]] = {}
    for tasks in ("beginnings", "endings"):
        odd |= odd_answers(train[tasks], train["answers"], train["labels"], train["kinds"])
    copies = _copies(table, held)
    found = np.any([others >= 0 for *_, others in copies], axis=0)
    found[list(odd)] = True
    for place in np.flatnonzero(found):
        row, report = train[place], reports[train["files"][place]]
        for code, text, source, others in copies:
            if others[place] < 0:
                continue
            other = source[others[place]]
            line = f"line {other['lines']}"
            if code in (Code.LEAK, Code.NEAR_LEAK):
                line += f" of the held-out file {reports[other['files']].file}"
            elif other["files"] != row["files"]:
                line += f" of {reports[other['files']].file}"
            report.add(int(row["lines"]), code, text.format(line))
        if place in odd:
            report.add(int(row["lines"]), *odd[place])


def _copies(table: LineTable, held: int) -> list[tuple[Code, str, Rows, NDArray[np.int64]]]:
    """Find the training examples that repeat another example.

    Returns:
        For each kind: its text, with a gap for the line of the other example; the rows among which the other one is;
        and its place there for each training example, or -1.
    """
    heldout, train = table.rows[:held], table.rows[held:]
    sketches = table.sketches[held:]
    leak = places_in(train["prompts"], heldout["prompts"])
    near_leak = np.where(leak < 0, nearest(sketches, table.sketches[:held]), -1)
    same_pair = _earlier(train["pairs"] ^ train["systems"])  # with other tools it is another example
    same_prompt = np.where(same_pair < 0, _earlier(train["prompts"] ^ train["systems"]), -1)
    _, near = clusters(sketches)
    other_task = train["systems"][near] != train["systems"]  # one text under two instructions is two examples
    near = np.where((same_pair >= 0) | (same_prompt >= 0) | other_task, -1, near)
    return [
        (Code.LEAK, "{} has the same prompt", heldout, leak),
        (Code.NEAR_LEAK, "{} asks nearly the same", heldout, near_leak),
        (Code.DUPLICATE, "same as {}", train, same_pair),
        (Code.CONTRADICTION, "same prompt as {}, another answer", train, same_prompt),
        (Code.NEAR_DUPLICATE, "asks nearly the same as {}", train, near),
    ]


def _earlier(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the first place with the same key, or -1 if that is the place itself."""
    first = first_with_same(keys)
    return np.where(first == np.arange(len(keys)), -1, first)
