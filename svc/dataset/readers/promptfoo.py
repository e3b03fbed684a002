"""Reads Promptfoo YAML files as chat rows, one for each combination of a test and a prompt.

Promptfoo's templates are written in Nunjucks, a full programming language. Here, only variable names are
replaced; any other expression in braces is rejected, and so are references to files with code. Text files are
read if they are in the YAML file's folder or its subfolders. A test that yields no example is an error.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.row import MAX_ROW_BYTES, Row, too_large
from svc.dataset.text.decode import not_utf8
from svc.files.yaml_text import parse_yaml

_NAME = re.compile(r"\{\{-?\s*([A-Za-z_]\w*(?:\.\w+)*)\s*-?\}\}")
_CODE = re.compile(r"\{\{|\{%|\{#")
_FILE = "file://"
_TEXT_FILES = (".txt", ".md", ".json")
_REFERENCES = ("equals", "similar", "levenshtein", "rouge-n", "bleu", "meteor", "factuality", "contains", "icontains")
"""Assertion types whose value can serve as the reference answer, in order of preference. The first one that a
test contains is used."""


def read_promptfoo(path: Path, stream: BinaryIO) -> Iterator[Row]:
    """Yield a row for each combination of a test and a prompt. A row's line number is the line on which its test
    starts.

    Args:
        path: path of the YAML file; files that it refers to must be in the same folder or its subfolders.
    """
    raw = stream.read(MAX_ROW_BYTES + 1)
    try:
        if len(raw) > MAX_ROW_BYTES:
            raise too_large()
        text = raw.decode("utf-8-sig")
        suite, lines = _read_suite(path.absolute().parent, parse_yaml(text)), _test_lines(text)
    except UnicodeDecodeError as error:
        yield Row(1, raw, error=not_utf8(error))
    except RowError as error:
        yield Row(1, raw[:MAX_ROW_BYTES], error=error)
    except ValueError as error:
        yield Row(
            1, raw, error=RowError(Code.WRONG_FORMAT, f"invalid YAML: {error}", expected="a Promptfoo config in YAML")
        )
    else:
        for line, test in zip(lines, suite.tests, strict=True):
            written = json.dumps(test, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
            for prompt in suite.prompts:
                try:
                    yield Row(line, written, suite.example(prompt, test))
                except RowError as error:
                    yield Row(line, written, error=error)


@dataclass(frozen=True, slots=True)
class _Suite:
    """The tests in a Promptfoo file, and the prompts, variables and assertions that they share.

    Attributes:
        folder: folder that contains the YAML file.
        prompts: each is a string or a list of turns.
    """

    folder: Path
    tests: list[Any]
    prompts: list[Any]
    variables: dict[str, Any]
    assertions: list[Any]

    def example(self, prompt: Any, test: Any) -> dict[str, Any]:
        """Return the chat-format row for one prompt and one test.

        Raises:
            RowError: the test has no reference answer, or it would require running code.
        """
        if not isinstance(test, dict):
            raise _fault("tests", f"is {test!r:.80}", "a mapping with vars and assert")
        own = _mapping(test.get("vars"), "vars")
        variables = {key: self._variable(key, value) for key, value in (self.variables | own).items()}
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        messages = [turn | {"content": _render(turn["content"], variables, "prompts")} for turn in turns]
        answer = _reference([*_list(test.get("assert"), "assert"), *self.assertions], variables)
        return {"messages": [*messages, {"role": "assistant", "content": answer}]}

    def _variable(self, name: str, value: Any) -> Any:
        if isinstance(value, str) and value.startswith(_FILE):
            return _read_beside(self.folder, value, f"vars.{name}")
        if isinstance(value, list):
            raise _fault(f"vars.{name}", "is a list, which Promptfoo expands to several tests", "one value per test")
        return value


def _reference(assertions: list[Any], variables: dict[str, Any]) -> str:
    given = [assertion for assertion in assertions if isinstance(assertion, dict)]
    for kind in _REFERENCES:
        values = {str(assertion.get("value")) for assertion in given if assertion.get("type") == kind}
        if len(values) > 1:
            raise _fault("assert", f"has {len(values)} different values of type {kind}", "one reference answer")
        if values:
            return _render(values.pop(), variables, "assert")
    kinds = ", ".join(sorted({str(assertion.get("type")) for assertion in given})) or "none"
    raise _fault("assert", f"has no reference answer, only {kinds:.200}", f"one of type {', '.join(_REFERENCES)}")


def _render(template: str, variables: dict[str, Any], field: str) -> str:
    """Fill in the variables of a template. Values of variables are inserted verbatim and not treated as templates.

    Raises:
        RowError: the template contains code, or a variable that is not defined.
    """
    if _CODE.search(_NAME.sub("", template)):
        raise _fault(field, f"has code in its template: {template!r:.120}", "only variable names, such as {{question}}")

    def value_of(name: re.Match[str]) -> str:
        value: Any = variables
        for key in name[1].split("."):
            if not isinstance(value, dict) or key not in value:
                raise _fault(field, f"uses {name[0]}, which is not in vars", f"one of {', '.join(variables) or '-'}")
            value = value[key]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    return _NAME.sub(value_of, template)


def _read_beside(folder: Path, reference: str, field: str) -> str:
    """Return the contents of a text file that the YAML file refers to.

    Raises:
        RowError: the file is outside the folder, its suffix is not that of a text file, or it cannot be read.
    """
    path = (folder / reference.removeprefix(_FILE)).resolve()
    if not path.is_relative_to(folder.resolve()) or path.suffix not in _TEXT_FILES:
        expected = f"a file in the YAML file's folder or a subfolder, with a name that ends in {', '.join(_TEXT_FILES)}"
        raise _fault(field, f"is {reference!r:.120}", expected)
    try:
        with path.open("rb") as file:
            return file.read(MAX_ROW_BYTES).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise _fault(field, f"is {reference!r:.120}, which cannot be read", "a UTF-8 text file") from error


def _read_suite(folder: Path, value: Any) -> _Suite:
    if not isinstance(value, dict) or "tests" not in value:
        raise _fault("", "the file is not a Promptfoo config", "a mapping with prompts and tests")
    if not isinstance(value["tests"], list):
        raise _fault("tests", f"is {value['tests']!r:.80}", "a list of tests in this file")
    default = _mapping(value.get("defaultTest"), "defaultTest")
    prompts = [_prompt(folder, prompt) for prompt in _list(value.get("prompts"), "prompts")]
    if not prompts:
        raise _fault("prompts", "is missing", "a list of prompts")
    variables = _mapping(default.get("vars"), "defaultTest.vars")
    return _Suite(folder, value["tests"], prompts, variables, _list(default.get("assert"), "defaultTest.assert"))


def _prompt(folder: Path, prompt: Any) -> Any:
    """Return a prompt's text, or its turns if the text is a JSON list."""
    if isinstance(prompt, dict):
        prompt = prompt.get("raw", prompt.get("id"))
    if not isinstance(prompt, str):
        raise _fault("prompts", f"contains {prompt!r:.80}", "strings")
    text = _read_beside(folder, prompt, "prompts") if prompt.startswith(_FILE) else prompt
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(turns, list):
        return text
    if not turns or not all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns):
        raise _fault("prompts", f"contains {text!r:.80}", "turns with role and content")
    return turns


def _test_lines(text: str) -> list[int]:
    """Return the line number at which each test starts, counting from 1."""
    root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    *_, tests = (node for key, node in root.value if key.value == "tests")  # YAML takes the last of duplicate keys
    return [node.start_mark.line + 1 for node in tests.value]


def _mapping(value: Any, field: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _fault(field, f"is {value!r:.80}", "a mapping in this file")
    return value


def _list(value: Any, field: str) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise _fault(field, f"is {value!r:.80}", "a list")
    return value


def _fault(field: str, wrong: str, expected: str) -> RowError:
    return RowError(Code.WRONG_FORMAT, wrong, field=field, expected=expected)
