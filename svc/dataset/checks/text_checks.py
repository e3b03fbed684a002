"""What a text should not hold: tokens that end turns, template code, control characters, wrongly decoded UTF-8.

All of these are doubts about a text, not faults: it stays text, and can be trained on. Knows nothing of examples.
"""

import re
from collections.abc import Iterable, Iterator

from ftfy.badness import BADNESS_RE

from svc.dataset.problem.problem import Code

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
"""Repetitions are bounded or end at a brace, so that every text takes a time in proportion to its length."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f]")
_HIDDEN = re.compile("\u202e|(?<![\U0001f3f4\U000e0020-\U000e007e])[\U000e0020-\U000e007f]")
"""What hides text or its order; tag characters after a black flag make the flag of a region."""

_GOOD = re.compile("\x85|(?<=Å)[²³±]|(?<=[A-ZÀ-Þ]Ã)[”»]|»(?=[ÄÖÜ])")
"""What ftfy doubts and is good: a line end, units (Å²), quotes after words in capitals and around German (»Öl«)."""
_SHOWN = 60


class TextChecks:
    """The checks of one text.

    Args:
        tokens: further special tokens, of the base model that will be trained.
    """

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        own = "".join("|" + re.escape(token) for token in sorted(tokens) if token.strip())
        self._special = re.compile(_SPECIAL + own)
        self._marks = None if own else ("<", "[")

    def problems(self, text: str) -> tuple[tuple[Code, str], ...]:
        """Return what is doubtful in a text, each kind once, with the first place where it stands."""
        return tuple(self._find(text))

    def _find(self, text: str) -> Iterator[tuple[Code, str]]:
        if self._marks is None or any(mark in text for mark in self._marks):
            yield from _first(self._special, text, Code.SPECIAL_TOKEN, "holds the special token")
        if "{" in text:
            yield from _first(_JINJA, text, Code.TEMPLATE_CODE, "holds template code")
        if found := _CONTROL.search(text):
            yield Code.CONTROL_CHARACTER, f"holds the control character U+{ord(found[0]):04X} at {found.start()}"
        if not text.isascii():
            if found := _HIDDEN.search(text):
                yield Code.CONTROL_CHARACTER, f"holds the character U+{ord(found[0]):04X}, unseen, at {found.start()}"
            if (place := text.find("\ufffd")) >= 0:
                yield Code.MOJIBAKE, f"holds U+FFFD, which stands for what could not be read, at {place}"
            yield from _first(
                BADNESS_RE, _GOOD.sub(" ", text), Code.MOJIBAKE, "seems to be UTF-8 read as another encoding:"
            )


def _first(pattern: re.Pattern[str], text: str, code: Code, what: str) -> Iterator[tuple[Code, str]]:
    if found := pattern.search(text):
        yield code, f"{what} {found[0][:_SHOWN]!r} at {found.start()}"
