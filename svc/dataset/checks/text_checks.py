"""Finds suspicious content in texts: special tokens, template code, control characters and mojibake.

Such content only causes warnings, because the text can still be trained on. This module knows nothing about
examples.
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
