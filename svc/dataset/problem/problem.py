"""Problems found in examples. Every kind of problem has a code, a severity and a remedy.

docs/data.md explains each code; a test checks this. This module knows nothing about files except their
names.
"""

from dataclasses import dataclass
from enum import StrEnum

from svc.errors import DataError


class Severity(StrEnum):
    """Severity of a problem, which determines whether the line can still be trained on."""

    ERROR = "error"
    WARNING = "warning"


class Code(StrEnum):
    """The kinds of problems that a line can have."""

    UNREADABLE = "unreadable"
    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    TOO_LARGE = "too_large"
    WRONG_FORMAT = "wrong_format"
    MIXED_FORMATS = "mixed_formats"
    WRONG_ROLE = "wrong_role"
    WRONG_CONTENT = "wrong_content"
    WRONG_TURNS = "wrong_turns"
    WRONG_TOOLS = "wrong_tools"
    WRONG_WEIGHT = "wrong_weight"
    WRONG_LABEL = "wrong_label"
    DIFFERENT_PROMPTS = "different_prompts"
    EQUAL_ANSWERS = "equal_answers"
    TEMPLATE_REFUSES = "template_refuses"
    EMPTY = "empty"
    LEAK = "leak"
    BLANK = "blank"
    NO_USER_TURN = "no_user_turn"
    ENCODED_TWICE = "encoded_twice"
    NEAR_LEAK = "near_leak"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    CONTRADICTION = "contradiction"
    SPECIAL_TOKEN = "special_token"  # noqa: S105 - no password
    TEMPLATE_CODE = "template_code"
    CONTROL_CHARACTER = "control_character"
    MOJIBAKE = "mojibake"
    TOO_LONG = "too_long"
    SAME_ROLE_TWICE = "same_role_twice"
    ASSISTANT_FIRST = "assistant_first"
    LABEL_NOT_IN_SET = "label_not_in_set"
    ANSWER_NOT_JSON = "answer_not_json"
    LENGTH_BIAS = "length_bias"
    ONE_LABEL = "one_label"


_ERRORS = {
    Code.UNREADABLE: "fetch or unpack the file again; the rest of the file was not read",
    Code.NOT_UTF8: "save the file as UTF-8",
    Code.NOT_JSON: "fix the line or drop it",
    Code.TOO_LARGE: "split the example or drop it",
    Code.WRONG_FORMAT: "write the example in one of the formats listed in docs/data.md",
    Code.MIXED_FORMATS: "use one format per file; different files may have different formats",
    Code.WRONG_ROLE: "correct the role",
    Code.WRONG_CONTENT: "write the turn's text as a string, or drop the example",
    Code.WRONG_TURNS: "reorder the turns so that the assistant's answer comes last, or drop the example",
    Code.WRONG_TOOLS: "write tools and tool calls in the OpenAI API's format, or drop the example",
    Code.WRONG_WEIGHT: "give assistant turns weight 1 (learn) or 0 (do not learn), and other turns no weight",
    Code.WRONG_LABEL: "give the answer the label true (desirable) or false, or drop the example",
    Code.DIFFERENT_PROMPTS: "give both answers the same prompt, or drop the pair",
    Code.EQUAL_ANSWERS: "drop the pair; nothing can be learned from it",
    Code.TEMPLATE_REFUSES: "change the example's turns, or choose another base",
    Code.EMPTY: "check whether this is the right file",
    Code.LEAK: "drop the line here or from the held-out set; otherwise the held-out results are meaningless",
}
_WARNINGS = {
    Code.BLANK: "no action is needed; the line is skipped",
    Code.NO_USER_TURN: "no action is needed; the line is skipped; to train on it, add the user turn that is answered",
    Code.ENCODED_TWICE: "no action is needed; the arguments are decoded and trained on as an object",
    Code.NEAR_LEAK: "compare the two examples; drop one if the other gives away the held-out answer",
    Code.DUPLICATE: "drop one of the two, unless the example should count twice",
    Code.NEAR_DUPLICATE: "compare the two examples, and drop one if they mean the same",
    Code.CONTRADICTION: "decide which answer or preference is right, and drop the other example",
    Code.SPECIAL_TOKEN: "remove the token unless the text is about it: a model may read it as the end of a turn",
    Code.TEMPLATE_CODE: "check that the code belongs in the text; it is never run here, but other tools may run it",
    Code.CONTROL_CHARACTER: "remove the character",
    Code.MOJIBAKE: "convert the source again, as UTF-8",
    Code.TOO_LONG: "shorten or split the example, or raise the maximum length if memory allows",
    Code.SAME_ROLE_TWICE: "merge the turns, or add the missing turn; some chat templates reject repeated roles",
    Code.ASSISTANT_FIRST: "add a user turn before it, or drop it; some chat templates require a user turn first",
    Code.LABEL_NOT_IN_SET: "correct the label, or add it to the instruction",
    Code.ANSWER_NOT_JSON: "write the answer as JSON like the other answers, or drop the example",
    Code.LENGTH_BIAS: "add pairs whose chosen answer is the shorter one; otherwise the model learns to write more",
    Code.ONE_LABEL: "add answers with the other label; KTO compares desirable with undesirable answers",
}
TODO: dict[Code, str] = {**_ERRORS, **_WARNINGS}
"""Instructions to the user for fixing a problem, keyed by problem code."""


def severity_of(code: Code) -> Severity:
    """Return a code's severity.

    A line with an error stops training. A line with a warning should be checked by a person; if it does not contain an
    example, it is skipped.
    """
    return Severity.ERROR if code in _ERRORS else Severity.WARNING


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem in one line of a data file.

    Attributes:
        line: line number, starting at 1; for a Parquet file, the row number.
        field: path within the example, as named in the file; empty if the problem concerns the whole
            example.
    """

    file: str
    line: int
    severity: Severity
    code: Code
    message: str
    field: str
    todo: str


def printable(text: str) -> str:
    """Escape the characters in a text that would move the terminal cursor or cannot be encoded as UTF-8."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class RowError(DataError):
    """Raised for an example that cannot be trained on.

    Args:
        field: path within the example; the message begins with it.
        wrong: what is wrong, including the offending value; unprintable characters in it are escaped.
    """

    def __init__(self, code: Code, wrong: str, *, field: str = "", expected: str = "") -> None:
        wrong = printable(wrong)
        super().__init__(f"{field} {wrong}" if field else wrong, expected=expected, todo=TODO[code])
        self.code = code
        self.field = field
        self._detail = wrong

    def at(self, field: str) -> "RowError":
        """Return the same error for a different field."""
        return RowError(self.code, self._detail, field=field, expected=self.expected)
