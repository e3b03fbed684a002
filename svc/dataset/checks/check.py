"""Checks files of chat examples or preferences line by line, before any model is loaded.

Lines that cannot be trained on are errors. Lines that a person should check are warnings. Files are
streamed, keeping about 200 bytes per example in memory but never its text. Checks that need all examples
(duplicates, leaks, labels) run at the end.

Preferences: a model learns to write longer answers if length distinguishes the chosen answers from the rejected ones
(Park et al. 2024, "Disentangling Length from Quality in Direct Preference Optimization", arXiv:2403.19159).

Special tokens, template code, control characters and mojibake only cause warnings, because the text can still be
trained on.
"""

import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from ftfy.badness import BADNESS_RE
from numpy.typing import NDArray

from svc.dataset.checks.base_tokenizer import BaseTokenizer
from svc.dataset.checks.labels import FEW_ANSWERS, AnswerClass, AnswerKind, few_labels, look_at_answer, odd_answers
from svc.dataset.checks.line_table import LineTable, LineTableBuilder, Rows, first_with_same
from svc.dataset.checks.minhash import clusters, nearest, places_in
from svc.dataset.problem.problem import Code, RowError
from svc.dataset.problem.problem_log import ProblemLog
from svc.dataset.readers.preferences import read_any_lines
from svc.dataset.readers.reader import AnyExample, Kind, Line, chat_of
from svc.dataset.schema.example import ChatExample, Message, Role, answered_prompts, normal_prompt
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from svc.sample_size import Z_INTERVAL

MAX_LENGTH = 4096
"""Default maximum length of an example, in tokens."""
_BYTES_PER_TOKEN = 4.2  # English under a byte-level BPE of 49,152 entries; other languages have fewer
_MAX_COUNTED_ANSWER = 200
_MAX_CHARACTERS = 2**32 - 1

OnRead = Callable[[int], None]
MAX_LONGER_SHARE = 0.7
"""If the chosen answer is longer in more than this fraction of pairs, the pairs count as biased."""
_GEMMA_4 = "turn|channel|tool|tool_call|tool_response|image|audio|video"
_SPECIAL = (
    r"<[|｜][^\s<>|｜]{1,64}[|｜]>"  # ChatML, Llama 3, Phi, Qwen, DeepSeek  # noqa: RUF001
    r"|\[/?INST\]|<</?SYS>>"  # Llama 2, Mistral
    r"|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT)\]"  # Mistral
    r"|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_(?:turn|image|role|text)>"  # Llama 2, Gemma, Granite
    r"|<(?:begin|end)_of_(?:text|sentence)>"
    r"|<\|(?:" + _GEMMA_4 + r")>|<(?:" + _GEMMA_4 + r")\|>"
)
_STATEMENTS = (
    "block|break|call|continue|do|elif|else|extends|filter|for|from|generation|if|import|include|macro|raw|set|with"
    "|end(?:block|call|filter|for|generation|if|macro|raw|set|with)"
)
_JINJA = re.compile(
    r"\{%[-+]?\s*(?:" + _STATEMENTS + r")\b[^{}%]*%\}"
    r"|\{#[^{}]{1,500}#\}"
    r"|(?<![\\\w{}^$=])\{\{(?!-?[\d\s.]{1,60}\}\})-?[ \t]{0,20}[\w.\[\]'\"]{1,80}"  # not a number: C++ has {{1}}
    r"(?:[ \t]{0,20}(?:[|*/+(\[~<>-]|[=!]=|\b(?:if|is|in|and|or|not)\b)[^{};\n]{0,200})?[ \t]{0,20}-?\}\}"
)
"""Matches template code. Repetitions are bounded or end at a brace, so that matching takes linear time."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f]")
_HIDDEN = re.compile("\u202e|(?<![\U0001f3f4\U000e0020-\U000e007e])[\U000e0020-\U000e007f]")
"""Matches characters that hide text or change its order. Tag characters after a black flag are excluded, because they
encode a region's flag."""

_GOOD = re.compile("\x85|(?<=Å)[²³±]|(?<=[A-ZÀ-Þ]Ã)[”»]|»(?=[ÄÖÜ])")
"""Matches valid text that ftfy would flag: the line break U+0085, units (Å²), and quotation marks after capitalized
words or around German words (»Öl«)."""
_MAX_SHOWN = 60


class TextChecks:
    """Finds suspicious content in texts.

    Args:
        tokens: special tokens of the base model, in addition to well-known ones.
    """

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        own = "".join("|" + re.escape(token) for token in sorted(tokens) if token.strip())
        self._special = re.compile(_SPECIAL + own)
        self._marks = None if own else ("<", "[")

    def problems(self, text: str) -> tuple[tuple[Code, str], ...]:
        """Return a code and a message for each kind of suspicious content in the text.

        The message gives the position of the first occurrence.
        """
        return tuple(self._find(text))

    def _find(self, text: str) -> Iterator[tuple[Code, str]]:
        if self._marks is None or any(mark in text for mark in self._marks):
            yield from _first(self._special, text, Code.SPECIAL_TOKEN, "contains the special token")
        if "{" in text:
            yield from _first(_JINJA, text, Code.TEMPLATE_CODE, "contains template code")
        if match := _CONTROL.search(text):
            yield Code.CONTROL_CHARACTER, f"contains the control character U+{ord(match[0]):04X} at {match.start()}"
        if not text.isascii():
            if match := _HIDDEN.search(text):
                yield (
                    Code.CONTROL_CHARACTER,
                    f"contains the invisible character U+{ord(match[0]):04X} at {match.start()}",
                )
            if (place := text.find("\ufffd")) >= 0:
                yield Code.MOJIBAKE, f"contains U+FFFD, which replaces an unreadable character, at {place}"
            yield from _first(
                BADNESS_RE, _GOOD.sub(" ", text), Code.MOJIBAKE, "appears to be UTF-8 decoded with another encoding:"
            )


def _first(pattern: re.Pattern[str], text: str, code: Code, what: str) -> Iterator[tuple[Code, str]]:
    if match := pattern.search(text):
        yield code, f"{what} {match[0][:_MAX_SHOWN]!r} at {match.start()}"


@dataclass(frozen=True, slots=True)
class AnswerLengths:
    """Lengths of the chosen and rejected answers of preference pairs, in characters."""

    chosen: "array[int]" = field(default_factory=lambda: array("I"))
    rejected: "array[int]" = field(default_factory=lambda: array("I"))

    def add(self, chosen: int, rejected: int) -> None:
        """Record the lengths of a pair's answers."""
        self.chosen.append(chosen)
        self.rejected.append(rejected)


@dataclass(frozen=True, slots=True)
class LengthBias:
    """Measurement of how often the chosen answer of a pair is the longer one.

    Attributes:
        longer: number of pairs whose chosen answer is longer.
        compared: number of pairs whose answers differ in length.
        low, high: bounds of the 95% confidence interval for `longer / compared` (Wilson 1927).
        chosen_characters, rejected_characters: median length of the answers.
    """

    longer: int
    compared: int
    low: float
    high: float
    chosen_characters: int
    rejected_characters: int

    @property
    def is_proven(self) -> bool:
        """Whether the pairs are biased toward longer answers with 95% confidence: `low` exceeds `MAX_LONGER_SHARE`."""
        return self.low > MAX_LONGER_SHARE

    def __str__(self) -> str:
        share = 100 * self.longer / self.compared
        return (
            f"the chosen answer is the longer one in {share:.0f}% of {self.compared} pairs "
            f"(95% interval {100 * self.low:.0f} to {100 * self.high:.0f}%); median length: chosen "
            f"{self.chosen_characters} characters, rejected {self.rejected_characters}"
        )


def measure_length_bias(lengths: AnswerLengths) -> LengthBias | None:
    """Return the length bias of pairs, or None if no pair has answers of different lengths."""
    chosen, rejected = np.frombuffer(lengths.chosen, np.uint32), np.frombuffer(lengths.rejected, np.uint32)
    longer, compared = int((chosen > rejected).sum()), int((chosen != rejected).sum())
    if not compared:
        return None
    low, high = _wilson_interval(longer, compared)
    return LengthBias(longer, compared, low, high, round(float(np.median(chosen))), round(float(np.median(rejected))))


def _wilson_interval(hits: int, total: int) -> tuple[float, float]:
    share, spread = hits / total, Z_INTERVAL**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(slots=True)
class DataReport:
    """Examples and problems found in a data file.

    Attributes:
        kind: kind of the examples.
        lengths: number of characters in each valid example; for a pair, counted with the longer answer.
        tokens: number of tokens in each valid example; for a pair, counted with the longer answer. Empty if tokens were
            not counted.
        answers: number of occurrences of each final answer that is neither rejected nor undesirable. Incomplete if
            there are too many different answers for them to be labels.
        answer_lengths: lengths of the chosen and rejected answers of all pairs.
        documents: number of examples that are documents.
        desirable: number of answers labeled as desirable (True) and as undesirable (False).
    """

    file: str
    kind: Kind = Kind.CHAT
    lines: int = 0
    examples: int = 0
    documents: int = 0
    lengths: "array[int]" = field(default_factory=lambda: array("I"))
    tokens: "array[int]" = field(default_factory=lambda: array("I"))
    answers: Counter[str] = field(default_factory=Counter)
    answer_lengths: AnswerLengths = field(default_factory=AnswerLengths)
    desirable: Counter[bool] = field(default_factory=Counter)
    problems: ProblemLog = field(default_factory=ProblemLog)

    @property
    def median_characters(self) -> int:
        """Median length of the examples in characters, or 0 if there are no examples."""
        return _median(self.lengths)

    @property
    def median_tokens(self) -> int:
        """Median length of the examples in tokens, or 0 if tokens were not counted."""
        return _median(self.tokens)

    @property
    def labels(self) -> dict[str, int] | None:
        """Count of each label, most frequent first, or None if the answers are too varied to be labels."""
        return few_labels(self.answers, self.examples) or None

    @property
    def length_bias(self) -> LengthBias | None:
        """Length bias of the pairs, or None if no pair has answers of different lengths."""
        return measure_length_bias(self.answer_lengths)

    def add(self, line: int, code: Code, message: str, where: str = "") -> None:
        """Add a problem found on a line to the report."""
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
    """Check all data files and report every problem.

    Args:
        paths: files that will be trained on together.
        heldout: files with held-out examples. Training on any of them would invalidate all later metrics.
        max_length: maximum number of tokens per example.
        base: tokenizer used to count tokens and to find special tokens in addition to the known ones, or None
            to estimate token counts.
        on_read: function called with the number of bytes read so far, over all files.

    Returns:
        One report for each of `paths`, then one for each held-out file. Duplicates are reported only for
        `paths`.

    Raises:
        DataError: a file cannot be opened.
    """
    reports = [DataReport(file=str(path)) for path in (*heldout, *paths)]
    checks = _LineChecks(max_length, base)
    table, read, held = LineTableBuilder(), 0, 0
    for index, (path, report) in enumerate(zip((*heldout, *paths), reports, strict=True)):
        before, last = read, 1
        report.kind, lines = read_any_lines(path, lambda position, before=before: on_read(before + position))  # type: ignore[misc]
        for line in lines:
            checks.check(report, line)
            last = line.number
            if line.example:
                table.add(index, line.number, line.example, _look_at(line.example))
        if not report.examples:
            report.add(last, Code.EMPTY, "the file contains no examples")
        if (bias := report.length_bias) and bias.is_proven:
            report.add(1, Code.LENGTH_BIAS, str(bias))
        read += path.stat().st_size
        held = len(table) if index < len(heldout) else held
    _compare(reports, table.finish(), held)
    _check_labels(reports[len(heldout) :])
    return [*reports[len(heldout) :], *reports[: len(heldout)]]


def _look_at(example: AnyExample) -> AnswerClass:
    return AnswerClass(AnswerKind.UNDESIRABLE) if _is_no_reference(example) else look_at_answer(chat_of(example))


def _is_no_reference(example: AnyExample) -> bool:
    """Return whether an example has no reference answer: it is a document, or its answer is labeled as undesirable."""
    return chat_of(example).is_document or (isinstance(example, LabeledAnswer) and not example.desirable)


def _check_labels(reports: Sequence[DataReport]) -> None:
    """Report a problem if all labeled answers have the same label and there are no preference pairs."""
    labeled = [report for report in reports if report.desirable]
    labels = {label for report in labeled for label in report.desirable}
    if len(labels) == 1 and not any(report.kind is Kind.PAIRS for report in reports):
        kind = "desirable" if labels == {True} else "undesirable"
        labeled[0].add(1, Code.ONE_LABEL, f"all {sum(report.examples for report in labeled)} answers are {kind}")


def shared_prompts(examples: Sequence[ChatExample], others: Sequence[ChatExample]) -> list[int]:
    """Return the indices of examples that share a prompt with `others`, ignoring whitespace and case.

    The prompts of an example's earlier answers are compared too, because those answers may be trained on.
    """
    prompts = {normal_prompt(other) for other in others}
    return [index for index, example in enumerate(examples) if not prompts.isdisjoint(answered_prompts(example))]


class _LineChecks:
    """Runs the checks that look at a single line, and adds the problems that they find to a report."""

    def __init__(self, max_length: int, base: BaseTokenizer | None) -> None:
        self._max_length = max_length
        self._base = base
        self._text = TextChecks(base.special_tokens if base else ()).problems
        self._shared_text = lru_cache(maxsize=64)(self._text)  # one system turn is in all lines

    def check(self, report: DataReport, line: Line[AnyExample]) -> None:
        report.lines += 1
        if error := line.error:
            wrong = f"{error.wrong}; expected {error.expected}" if error.expected else error.wrong
            report.add(line.number, error.code, wrong, error.field)
        elif line.example is None:
            report.add(line.number, Code.BLANK, "blank line, skipped")
        else:
            self._check_example(report, line.number, line.example, line.fields)

    def _check_example(self, report: DataReport, number: int, example: AnyExample, fields: Sequence[str]) -> None:
        report.examples += 1
        report.documents += chat_of(example).is_document
        chat, sides = chat_of(example), [chat_of(example)]
        if isinstance(example, PreferencePair):
            sides.append(example.rejected)
            report.answer_lengths.add(*(min(len(side.answer), _MAX_CHARACTERS) for side in sides))
            self._check_message(report, number, example.rejected.messages[-1], fields[-1])
        if isinstance(example, LabeledAnswer):
            report.desirable[example.desirable] += 1
        report.lengths.append(min(max(side.characters for side in sides), _MAX_CHARACTERS))
        if not _is_no_reference(example) and len(report.answers) <= FEW_ANSWERS:  # more are free text
            report.answers[chat.answer[:_MAX_COUNTED_ANSWER]] += 1
        before = None
        for message, where in zip(chat.messages, fields, strict=False):
            self._check_message(report, number, message, where)
            if message.role is before and message.role in (Role.USER, Role.ASSISTANT):
                report.add(number, Code.SAME_ROLE_TWICE, f"{where}: two {before} turns in a row", where)
            if message.role is Role.ASSISTANT and before in (None, Role.SYSTEM):
                report.add(number, Code.ASSISTANT_FIRST, f"{where}: an assistant turn before any user turn", where)
            before = message.role
        for place, tool in enumerate(chat.tools):
            for code, text in self._shared_text(tool):
                report.add(number, code, f"tools[{place}] {text}", f"tools[{place}]")
        if not chat.is_document:  # documents are cut
            self._check_length(report, number, sides)

    def _check_message(self, report: DataReport, number: int, message: Message, where: str) -> None:
        check = self._shared_text if message.role is Role.SYSTEM else self._text
        for code, text in check(message.content):
            report.add(number, code, f"{where} {text}", where)
        turn = where.removesuffix(".content")
        shown = [("the name", message.name or ""), ("the reasoning", message.reasoning or "")]
        shown += [("a tool call", f"{call.name} {call.arguments}") for call in message.tool_calls]
        for part, content in shown:
            for code, text in self._text(content):
                report.add(number, code, f"{turn} {text} in {part}", turn)
        for place, call in enumerate(message.tool_calls):
            if call.encoded_twice:
                field = f"{turn}.tool_calls[{place}].function.arguments"
                report.add(number, Code.ENCODED_TWICE, f"{field} is double-encoded JSON", field)

    def _check_length(self, report: DataReport, number: int, sides: Sequence[ChatExample]) -> None:
        """Check an example's number of tokens. If there are two answers, the longer one is counted."""
        try:
            counts = [self._count(side) for side in sides]
        except RowError as error:
            report.add(number, error.code, error.wrong)
            return
        tokens = max(counts)
        if self._base:
            report.tokens.append(tokens)
        if tokens > self._max_length:
            about = "" if self._base else "about "
            report.add(number, Code.TOO_LONG, _too_long(sides[counts.index(tokens)], tokens, about, self._max_length))

    def _count(self, example: ChatExample) -> int:
        return self._base.count(example) if self._base else round(example.utf8_bytes / _BYTES_PER_TOKEN)


def _too_long(example: ChatExample, tokens: int, about: str, limit: int) -> str:
    characters = example.characters
    over = round(characters * (1 - limit / tokens))
    lost = "including the whole answer" if over >= len(example.answer) else "all of them from the answer"
    text = f"{characters} characters, {about}{tokens} tokens; the maximum is {limit}"
    return f"{text}: the last {over} characters would be cut off, {lost}"


def _compare(reports: list[DataReport], table: LineTable, held: int) -> None:
    """Report problems that can only be found after all lines have been read: duplicates, leaks and unusual answers.

    Args:
        held: number of held-out examples, which are the first rows of `table`.
    """
    train = table.rows[held:]
    odd: dict[int, tuple[Code, str]] = {}
    for tasks in ("beginnings", "endings"):
        odd |= odd_answers(train[tasks], train["answers"], train["labels"], train["kinds"])
    copies = _copies(table, held)
    reported = np.any([others >= 0 for *_, others in copies], axis=0)
    reported[list(odd)] = True
    for place in np.flatnonzero(reported):
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
    """Find the training examples that duplicate another example.

    Returns:
        For each kind of duplicate: its code; its message, with a placeholder for the other example's line; the rows
        that were searched (held-out or training examples); and, for each training example, the index of its duplicate
        in these rows, or -1.
    """
    heldout, train = table.rows[:held], table.rows[held:]
    sketches = table.sketches[held:]
    leak = places_in(train["prompts"], heldout["prompts"])
    earlier = table.earlier[table.earlier["rows"] >= held]
    places = places_in(earlier["prompts"], heldout["prompts"])
    leak[earlier["rows"][places >= 0] - held] = places[places >= 0]
    near_leak = np.where(leak < 0, nearest(sketches, table.sketches[:held]), -1)
    same_pair = _earlier(train["pairs"] ^ train["systems"])  # with other tools it is another example
    same_prompt = _earlier(train["prompts"] ^ train["systems"])
    # A prompt may have several pairs and labeled answers.
    is_preference = train["opposites"] != 0
    again = is_preference & (same_prompt >= 0)
    same_prompt[(same_pair >= 0) | is_preference] = -1
    # With other thinking, the same answer is neither a copy nor a contradiction.
    same_prompt[train["answers"][same_prompt] == train["answers"]] = -1
    opposite = places_in(train["opposites"] ^ train["systems"], train["pairs"] ^ train["systems"])
    opposite[opposite > np.arange(len(train))] = -1
    _, near = clusters(sketches)
    other_task = train["systems"][near] != train["systems"]  # one text under two instructions is two examples
    near = np.where((same_pair >= 0) | (same_prompt >= 0) | again | other_task, -1, near)
    return [
        (Code.LEAK, "{} has the same prompt", heldout, leak),
        (Code.NEAR_LEAK, "{} has nearly the same prompt", heldout, near_leak),
        (Code.DUPLICATE, "same as {}", train, same_pair),
        (Code.CONTRADICTION, "same prompt as {}, but a different answer", train, same_prompt),
        (Code.CONTRADICTION, "same as {}, but with the opposite preference", train, opposite),
        (Code.NEAR_DUPLICATE, "nearly the same prompt as {}", train, near),
    ]


def _earlier(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the index of each key's first occurrence, or -1 where a key occurs for the first time."""
    first = first_with_same(keys)
    return np.where(first == np.arange(len(keys)), -1, first)
