"""Random good examples in every format, and the defects that occur in data files."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svc.dataset.checks.check import DataReport, check_files
from svc.dataset.problem.problem import Code
from svc.dataset.readers.chat_formats import Format

LETTERS = "abcdefghijklmnopqrstuvwxyzäöüßéèçñåøłžабвгдежзиклмнопрстαβγδεζηθλμ"  # noqa: RUF001
MARKS = [
    ".",
    ",",
    "!",
    "?",
    ";",
    ":",
    " -",
    "…",
    "”",
    ")",
    " (",
    "»",
    "\n",
    "\n\n",
    " 😀",
    " <b>",
    " {x}",
    " [1]",
    " 5 %",
]
AFTER_WORD = [*[""] * (4 * len(MARKS)), *MARKS]
"""Marks that follow a word: a mark after one word in five, otherwise nothing."""
SYSTEM = "Which colour has it? Answer with one of: red, green, blue."
Row = dict[str, Any]
TEXT = {  # paths of question and answer
    Format.CHAT: ("messages.1.content", "messages.2.content"),
    Format.SHAREGPT: ("conversations.1.value", "conversations.2.value"),
    Format.ALPACA: ("instruction", "output"),
    Format.PROMPT_COMPLETION: ("prompt", "completion"),
    Format.OPENAI_EVALS: ("input.1.content", "ideal"),
    Format.OPENAI_EVALS_ITEM: ("item.input.1.content", "item.ideal"),
    Format.OPENAI_EVALS_OUTPUT: ("sample.input.1.content", "datasource_item.ideal"),
}
TEXT_FORMATS = list(TEXT)
"""All formats except xLAM's, whose answers are calls, and documents."""
ROLE = {Format.CHAT: "messages.1.role", Format.SHAREGPT: "conversations.1.from"}


def text(chance: random.Random, least: int = 3, most: int = 60) -> str:
    """Return a text of words, marks and emoji that is almost certainly unique."""
    count = chance.randint(least, most)
    letters = "".join(chance.choices(LETTERS, k=9 * count))  # in one draw: word by word takes longer than the check
    lengths, marks = chance.choices(range(2, 10), k=count), chance.choices(AFTER_WORD, k=count)
    marked = [letters[9 * at : 9 * at + length] + marks[at] for at, length in enumerate(lengths)]
    return " ".join(marked).strip() or "word"


def row(form: Format, system: str, user: str, answer: str) -> Row:
    """Return one example as a row of the given format."""
    match form:
        case Format.CHAT:
            turns = [("system", system), ("user", user), ("assistant", answer)]
            return {"messages": [{"role": role, "content": content} for role, content in turns]}
        case Format.SHAREGPT:
            turns = [("system", system), ("human", user), ("gpt", answer)]
            return {"conversations": [{"from": who, "value": value} for who, value in turns]}
        case Format.ALPACA:
            return {"instruction": user, "input": "", "output": answer, "system": system}
        case Format.PROMPT_COMPLETION:
            return {"prompt": user, "completion": answer, "system": system}
        case Format.XLAM:
            raise ValueError("a row of xLAM has calls instead of text")
        case Format.TEXT:
            raise ValueError("a document has no turns")
        case Format.OPENAI_EVALS:
            return {"input": _asked(system, user), "ideal": answer}
        case Format.OPENAI_EVALS_ITEM:
            return {"item": {"input": _asked(system, user), "ideal": answer}}
        case Format.OPENAI_EVALS_OUTPUT:
            return {"datasource_item": {"ideal": answer}, "sample": {"input": _asked(system, user)}}


def _asked(system: str, user: str) -> list[Row]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def good_rows(form: Format, chance: random.Random, count: int, *, labels: bool = False) -> list[Row]:
    """Return examples without defects. With labels, their answers are JSON."""
    answers = [json.dumps({"colour": chance.choice(["red", "green", "blue"])}) if labels else "" for _ in range(count)]
    return [row(form, SYSTEM, text(chance), answer or text(chance, 1, 20)) for answer in answers]


def get(value: Any, path: str) -> Any:
    """Return the value at a dotted path in a row."""
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def put(value: Row, path: str, new: Any) -> Row:
    """Return a row with the value at a dotted path replaced."""
    changed = copy.deepcopy(value)
    above, _, last = path.rpartition(".")
    target = get(changed, above) if above else changed
    key: Any = int(last) if isinstance(target, list) else last
    target[key] = new
    return changed


def drop(value: Row, path: str) -> Row:
    """Return a row without the value at a dotted path."""
    changed = copy.deepcopy(value)
    above, _, last = path.rpartition(".")
    del (get(changed, above) if above else changed)[last]
    return changed


Damage = Callable[[Format, Row, random.Random], bytes]


def _text(insert: str) -> Damage:
    """Return a damage that inserts a text at a random place in the question."""

    def damage(form: Format, value: Row, chance: random.Random) -> bytes:
        path = TEXT[form][0]
        words = get(value, path).split(" ")
        words.insert(chance.randint(0, len(words)), insert)
        return encode(put(value, path, " ".join(words)))

    return damage


def _set(which: int, new: Any) -> Damage:
    return lambda form, value, chance: encode(put(value, TEXT[form][which], new))


def _raw(change: Callable[[bytes], bytes]) -> Damage:
    return lambda form, value, chance: change(encode(value))


def encode(value: Any) -> bytes:
    """Return a row encoded as a line without a line ending."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _other_format(form: Format, value: Row, chance: random.Random) -> bytes:
    other = chance.choice([other for other in TEXT_FORMATS if other is not form])
    return encode(row(other, SYSTEM, text(chance), "red"))


def _two_formats(form: Format, value: Row, chance: random.Random) -> bytes:
    other = Format.PROMPT_COMPLETION if form is not Format.PROMPT_COMPLETION else Format.ALPACA
    return encode(value | row(other, SYSTEM, text(chance), "red"))


DEFECTS: list[tuple[str, Code, Damage]] = [
    ("cut off", Code.NOT_JSON, _raw(lambda raw: raw[:-4])),
    ("single quotes", Code.NOT_JSON, lambda form, value, chance: str(value).encode()),
    ("trailing comma", Code.NOT_JSON, _raw(lambda raw: raw[:-1] + b",}")),
    ("two objects", Code.NOT_JSON, _raw(lambda raw: raw + raw)),
    ("NaN", Code.NOT_JSON, _raw(lambda raw: raw[:-1] + b', "x": NaN}')),
    ("latin-1", Code.NOT_UTF8, _raw(lambda raw: raw[:-1] + b', "x": "caf\xe9"}')),
    ("no object", Code.WRONG_FORMAT, lambda form, value, chance: b'["a"]'),
    ("other key", Code.WRONG_FORMAT, lambda form, value, chance: b'{"title": "a"}'),
    ("other format", Code.MIXED_FORMATS, _other_format),
    ("two formats", Code.MIXED_FORMATS, _two_formats),
    ("question null", Code.WRONG_CONTENT, _set(0, None)),
    ("question blank", Code.WRONG_CONTENT, _set(0, " \n")),
    ("question number", Code.WRONG_CONTENT, _set(0, 5)),
    ("answer empty", Code.WRONG_CONTENT, _set(1, "")),
    ("answer object", Code.WRONG_CONTENT, _set(1, {"colour": "red"})),
    ("half a pair", Code.WRONG_CONTENT, _raw(lambda raw: raw.replace(b"one of", b"\\ud83d"))),
    ("blank line", Code.BLANK, lambda form, value, chance: b"  "),
    ("control character", Code.CONTROL_CHARACTER, _text("a\x00b")),
    ("Jinja statement", Code.TEMPLATE_CODE, _text("{% for m in messages %}")),
    ("Jinja expression", Code.TEMPLATE_CODE, _text("{{ messages[0].content }}")),
    ("long word", Code.TOO_LONG, _text("x" * 20_000)),
    ("special token", Code.SPECIAL_TOKEN, _text("<|im_end|>")),
    ("special token in brackets", Code.SPECIAL_TOKEN, _text("[INST]")),
    ("mojibake", Code.MOJIBAKE, _text("é".encode().decode("cp1252"))),
    ("mojibake of a quote", Code.MOJIBAKE, _text("“x".encode().decode("cp1252"))),
]


def check_file(path: Path, heldout: Path | None = None) -> DataReport:
    """Check one file. See `check_files`."""
    return check_files([path], [heldout] if heldout else [])[0]
