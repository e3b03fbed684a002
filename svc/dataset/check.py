"""What is wrong with a data file, line by line, before any model is loaded.

Errors are lines that cannot be trained on. Warnings are lines that can, and that a person should look at: copies,
answers that contradict each other, and examples that are also in the held-out set.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from svc.dataset.example import ChatExample
from svc.dataset.reader import read_lines

_FEW_ANSWERS = 50  # a task with at most so many different answers is shown with its label balance


class Severity(StrEnum):
    """Whether a line can be trained on."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding. `line` counts from 1."""

    file: str
    line: int
    severity: Severity
    code: str
    message: str


@dataclass(slots=True)
class DataReport:
    """What a file holds.

    Attributes:
        lengths: characters of each good example, all turns together.
        answers: how often each final answer stands.
    """

    file: str
    lines: int = 0
    examples: int = 0
    lengths: list[int] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """Lines that cannot be trained on."""
        return sum(problem.severity is Severity.ERROR for problem in self.problems)

    @property
    def median_characters(self) -> int:
        """Median length of an example, characters; 0 when there is none."""
        return round(statistics.median(self.lengths)) if self.lengths else 0

    @property
    def labels(self) -> dict[str, int] | None:
        """Answers by frequency when there are few different ones, else None."""
        few = 1 < len(self.answers) <= _FEW_ANSWERS and len(self.answers) <= self.examples // 2
        return dict(self.answers.most_common()) if few else None


def check_file(path: Path, heldout: Path | None = None) -> DataReport:
    """Reads the whole file and reports every problem.

    Args:
        heldout: examples that must not stand in the file: training on them makes every later figure a lie.

    Raises:
        DataError: a file that cannot be opened.
    """
    report = DataReport(file=str(path))
    kept_back = _conversations(heldout) if heldout else {}
    prompts: dict[str, tuple[int, str]] = {}
    for line in read_lines(path):
        report.lines += 1
        if line.error:
            _add(report, line.number, Severity.ERROR, "invalid", _text(line.error.wrong, line.error.expected))
        elif line.example is None:
            _add(report, line.number, Severity.WARNING, "blank", "blank line, skipped")
        else:
            _count(report, line.example)
            _compare(report, line.number, line.example, prompts, kept_back)
    if not report.examples:
        _add(report, max(report.lines, 1), Severity.ERROR, "empty", "no example in the whole file")
    return report


def shared_prompts(examples: Sequence[ChatExample], others: Sequence[ChatExample]) -> list[int]:
    """Indices of the examples whose prompt is also that of another one, spacing and case aside."""
    prompts = {_normal_prompt(other) for other in others}
    return [index for index, example in enumerate(examples) if _normal_prompt(example) in prompts]


def _count(report: DataReport, example: ChatExample) -> None:
    report.examples += 1
    report.lengths.append(example.characters)
    report.answers[example.answer] += 1


def _compare(
    report: DataReport,
    number: int,
    example: ChatExample,
    prompts: dict[str, tuple[int, str]],
    kept_back: dict[str, int],
) -> None:
    prompt, answer = _normal_prompt(example), _normal(example.answer)
    if prompt in kept_back:
        message = f"line {kept_back[prompt]} of the held-out file has the same prompt"
        _add(report, number, Severity.ERROR, "leak", message)
    if prompt not in prompts:
        prompts[prompt] = (number, answer)
        return
    earlier, earlier_answer = prompts[prompt]
    if answer == earlier_answer:
        _add(report, number, Severity.WARNING, "duplicate", f"same as line {earlier}")
    else:
        _add(report, number, Severity.WARNING, "contradiction", f"same prompt as line {earlier}, another answer")


def _conversations(path: Path) -> dict[str, int]:
    return {_normal_prompt(line.example): line.number for line in read_lines(path) if line.example}


def _normal_prompt(example: ChatExample) -> str:
    return "\x1f".join(f"{message.role}:{_normal(message.content)}" for message in example.prompt)


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _text(wrong: str, expected: str) -> str:
    return f"{wrong}; expected {expected}" if expected else wrong


def _add(report: DataReport, line: int, severity: Severity, code: str, message: str) -> None:
    report.problems.append(Problem(report.file, line, severity, code, message))
