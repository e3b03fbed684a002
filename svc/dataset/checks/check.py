"""What is wrong with data files, line by line, before any model is loaded.

Errors are lines that cannot be trained on. Warnings are lines that can, and that a person should look at. Files are
streamed: of each example some 200 bytes stay in memory, never its text; what needs all of them (copies, leaks, labels)
is found at the end.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svc.dataset.checks.labels import FEW_ANSWERS, look_at_answer, odd_answers
from svc.dataset.checks.line_table import LineTable, LineTableBuilder, first_with_same
from svc.dataset.checks.minhash import clusters, nearest
from svc.dataset.checks.text_checks import TextChecks
from svc.dataset.problem.problem import TODO, Code, Problem, RowError, Severity, severity_of
from svc.dataset.problem.problem_log import ProblemLog
from svc.dataset.readers.reader import Line, read_lines
from svc.dataset.schema.example import ChatExample, Message, Role
from svc.dataset.schema.normal_prompt import normal_prompt

MAX_LENGTH = 4096
"""Tokens from which on an example is called too long, when the caller does not say."""
_BYTES_A_TOKEN = 4.2  # English under a byte-level BPE of 49,152 entries; other languages have fewer
_DIFFERENT_ANSWERS = 1_000  # beyond, answers are free text and not counted
_LONG_ANSWER = 200

OnRead = Callable[[int], None]
CountTokens = Callable[[ChatExample], int]


@dataclass(slots=True)
class DataReport:
    """What a file holds.

    Attributes:
        lengths: characters of each good example, all texts together.
        tokens: of each good example; empty where they were not counted.
        answers: how often each final answer stands; None where there are too many different ones.
    """

    file: str
    lines: int = 0
    examples: int = 0
    lengths: "array[int]" = field(default_factory=lambda: array("I"))
    tokens: "array[int]" = field(default_factory=lambda: array("I"))
    answers: Counter[str] | None = field(default_factory=Counter)
    problems: ProblemLog = field(default_factory=ProblemLog)

    @property
    def errors(self) -> int:
        """Problems for which a line cannot be trained on."""
        return self.problems.severities[Severity.ERROR]

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
        """Answers by frequency when there are few different ones, else None."""
        if self.answers is None or not 1 < len(self.answers) <= min(FEW_ANSWERS, self.examples // 2):
            return None
        return dict(self.answers.most_common())

    def add(self, line: int, code: Code, message: str, where: str = "") -> None:
        """Notes one problem."""
        self.problems.add(Problem(self.file, line, severity_of(code), code, message, where, TODO[code]))


def _median(lengths: "array[int]") -> int:
    return round(float(np.median(np.frombuffer(lengths, np.uint32)))) if lengths else 0


def check_files(
    paths: Sequence[Path],
    heldout: Sequence[Path] = (),
    *,
    max_length: int = MAX_LENGTH,
    special_tokens: Iterable[str] = (),
    count_tokens: CountTokens | None = None,
    on_read: OnRead = lambda position: None,
) -> list[DataReport]:
    """Reads all files and reports every problem.

    Args:
        paths: what is to be trained on, together.
        heldout: examples that must not stand in them: training on these makes every later figure a lie.
        max_length: tokens that an example may have.
        special_tokens: those of the base model, beside the known ones.
        count_tokens: see svc.dataset.checks.token_count; without it tokens are estimated.
        on_read: told how many bytes of all files were read so far.

    Returns:
        One report for each of the paths, then one for each held-out file, in which examples are not compared.

    Raises:
        DataError: a file that cannot be opened.
    """
    reports = [DataReport(file=str(path)) for path in (*heldout, *paths)]
    checks = _LineChecks(max_length, special_tokens, count_tokens)
    table, read, kept_back = LineTableBuilder(), 0, 0
    for index, path in enumerate((*heldout, *paths)):
        before, last = read, 1
        for line in read_lines(path, lambda position, before=before: on_read(before + position)):  # type: ignore[misc]
            checks.check(reports[index], line)
            last = line.number
            if line.example:
                table.add(index, line.number, line.example, look_at_answer(line.example))
        if not reports[index].examples:
            reports[index].add(last, Code.EMPTY, "no example in the whole file")
        read += path.stat().st_size
        kept_back = len(table) if index < len(heldout) else kept_back
    _compare(reports, table.finish(), kept_back)
    return [*reports[len(heldout) :], *reports[: len(heldout)]]


def shared_prompts(examples: Sequence[ChatExample], others: Sequence[ChatExample]) -> list[int]:
    """Indices of the examples whose prompt is also that of another one, spacing and case aside."""
    prompts = {normal_prompt(other) for other in others}
    return [index for index, example in enumerate(examples) if normal_prompt(example) in prompts]


class _LineChecks:
    """What can be said of a line without the others."""

    def __init__(self, max_length: int, special_tokens: Iterable[str], count_tokens: CountTokens | None) -> None:
        self._max_length = max_length
        self._count_tokens = count_tokens
        texts = TextChecks(special_tokens)
        self._text: Callable[[str], tuple[tuple[Code, str], ...]] = lambda text: tuple(texts.problems(text))
        self._shared_text = lru_cache(maxsize=64)(self._text)  # one system turn stands in all lines

    def check(self, report: DataReport, line: Line) -> None:
        report.lines += 1
        if line.error:
            error = line.error
            wrong = f"{error.wrong}; expected {error.expected}" if error.expected else error.wrong
            report.add(line.number, error.code, wrong, error.field)
        elif line.example is None:
            report.add(line.number, Code.BLANK, "blank line, skipped")
        else:
            self._check_example(report, line, line.example)

    def _check_example(self, report: DataReport, line: Line, example: ChatExample) -> None:
        characters = example.characters
        report.examples += 1
        report.lengths.append(min(characters, 2**32 - 1))
        _count_answer(report, example.answer)
        before = None
        for message, where in zip(example.messages, line.fields, strict=True):
            check = self._shared_text if message.role is Role.SYSTEM else self._text
            for code, text in check(message.content):
                report.add(line.number, code, f"{where} {text}", where)
            if message.name or message.tool_calls:
                self._check_rest(report, line.number, message, where)
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
        if self._count_tokens is None:
            tokens, about = round(example.utf8_bytes / _BYTES_A_TOKEN), "about "
        else:
            try:
                tokens, about = self._count_tokens(example), ""
            except RowError as error:
                report.add(number, error.code, error.wrong)
                return
            report.tokens.append(tokens)
        if tokens > self._max_length:
            report.add(number, Code.TOO_LONG, _too_long(example, tokens, about, self._max_length))

    def _check_rest(self, report: DataReport, number: int, message: Message, where: str) -> None:
        """What else than its content a turn shows the model."""
        turn = where.removesuffix(".content")
        texts = [("name", message.name or "")]
        texts += [("call", f"{call.name} {call.arguments}") for call in message.tool_calls]
        for what, text in texts:
            for code, found in self._text(text):
                report.add(number, code, f"{turn} {found} of a {what}", turn)


def _too_long(example: ChatExample, tokens: int, about: str, limit: int) -> str:
    characters = example.characters
    over = round(characters * (1 - limit / tokens))
    lost = "the whole answer among them" if over >= len(example.answer) else "all in the answer"
    text = f"{characters} characters, {about}{tokens} tokens, where {limit} are the maximum"
    return f"{text}: the last {over} characters would be cut, {lost}"


def _count_answer(report: DataReport, answer: str) -> None:
    if report.answers is None:
        return
    report.answers[answer[:_LONG_ANSWER]] += 1
    if len(report.answers) > _DIFFERENT_ANSWERS:
        report.answers = None


def _compare(reports: list[DataReport], table: LineTable, kept_back: int) -> None:
    """What needs all lines: copies, leaks, odd answers.

    Args:
        kept_back: the first so many examples are the held-out ones.
    """
    train = slice(kept_back, None)
    odd_by_row: dict[int, tuple[Code, str]] = {}
    for tasks in (table.beginnings, table.endings):
        odd = odd_answers(tasks[train], table.answers[train], table.labels[train], table.kinds[train])
        odd_by_row |= {kept_back + place: (code, text) for place, code, text in odd}
    copies = _Copies.of(table, kept_back)
    for report in reports:
        report.problems.begin_pass()
    rows = set(odd_by_row) if len(odd_by_row) else set()
    for row in _in_order(copies.rows, rows):
        report, line = reports[table.files[row]], int(table.lines[row])
        for code, text, other in copies.problems(row):
            place = f"line {table.lines[other]}"
            if code in (Code.LEAK, Code.NEAR_LEAK):
                place += f" of the held-out file {reports[table.files[other]].file}"
            elif table.files[other] != table.files[row]:
                place += f" of {reports[table.files[other]].file}"
            report.add(line, code, text.format(place))
        if row in odd_by_row:
            report.add(line, *odd_by_row[row])


def _in_order(rows: NDArray[np.int64], others: set[int]) -> Iterator[int]:
    merged = np.union1d(rows, np.fromiter(others, np.int64, len(others)))
    return (int(row) for row in merged)


@dataclass(frozen=True, slots=True)
class _Copies:
    """For each example the row of another one that it repeats; -1: none.

    Attributes:
        rows: those where any is found.
    """

    rows: NDArray[np.int64]
    kept_back: int
    leak: NDArray[np.int64]
    near_leak: NDArray[np.int64]
    same_pair: NDArray[np.int64]
    same_prompt: NDArray[np.int64]
    near: NDArray[np.int64]

    @classmethod
    def of(cls, table: LineTable, kept_back: int) -> "_Copies":
        train = slice(kept_back, None)
        held, sketches = table.sketches.part(0, kept_back), table.sketches.part(kept_back, len(table.lines))
        leak = _places_in(table.prompts[train], table.prompts[:kept_back])
        near_leak = np.where(leak < 0, nearest(sketches, held), -1)
        systems = table.systems[train]
        same_pair = _earlier(table.pairs[train] ^ systems, kept_back)  # with other tools it is another example
        same_prompt = np.where(same_pair < 0, _earlier(table.prompts[train] ^ systems, kept_back), -1)
        _, near = clusters(sketches)
        other_task = systems[np.maximum(near, 0)] != systems  # one text under two instructions is two examples
        near = np.where((near < 0) | (same_pair >= 0) | (same_prompt >= 0) | other_task, -1, near + kept_back)
        found = (leak >= 0) | (near_leak >= 0) | (same_pair >= 0) | (same_prompt >= 0) | (near >= 0)
        return cls(np.flatnonzero(found) + kept_back, kept_back, leak, near_leak, same_pair, same_prompt, near)

    def problems(self, row: int) -> Iterator[tuple[Code, str, int]]:
        """Kind, text with a gap for the other's place, and the other's row."""
        kinds = (
            (Code.LEAK, "{} has the same prompt", self.leak),
            (Code.NEAR_LEAK, "{} asks nearly the same", self.near_leak),
            (Code.DUPLICATE, "same as {}", self.same_pair),
            (Code.CONTRADICTION, "same prompt as {}, another answer", self.same_prompt),
            (Code.NEAR_DUPLICATE, "asks nearly the same as {}", self.near),
        )
        for code, text, others in kinds:
            if (other := int(others[row - self.kept_back])) >= 0:
                yield code, text, other


def _earlier(keys: NDArray[np.uint64], offset: int) -> NDArray[np.int64]:
    """The first row with the same key, counted from `offset`; -1 where it is the row itself."""
    first = first_with_same(keys)
    return np.where(first == np.arange(len(keys)), -1, first + offset)


def _places_in(keys: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each key stands among the others; -1: nowhere."""
    if not len(others):
        return np.full(len(keys), -1)
    order = np.argsort(others, kind="stable")
    place = np.minimum(np.searchsorted(others[order], keys), len(others) - 1)
    return np.where(others[order[place]] == keys, order[place], -1)
