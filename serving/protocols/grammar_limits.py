"""Limits on the JSON schemas and regular expressions in a request, needed because clients share the engine.

vLLM parses a grammar in the event loop that also serves all other requests and the health check, and compiles
it on threads that compete with these requests for CPU. The limits are based on measurements of xgrammar
0.2.8 with a vocabulary of 49,000 tokens, on a machine with two cores:

- A pattern `[a-z]{0,N}` is parsed in 0.03 s for N = 500, 0.1 s for 1,000, 1.7 s for 4,000 and more than
  20 s for 10,000. When nested, `([a-z]{0,N},){0,N}` is compiled in 2 s for N = 30 and more than 8 s for
  60; `[a-z]?` repeated N times is compiled in 0.5 s for N = 25, 3 s for 50 and more than 6 s for 100.
- An object of N optional properties is compiled in 0.3 s for N = 300, 0.9 s for 500, 3.5 s for 1,000 and
  more than 20 s for 3,000. If `maxProperties` is half of N, it is compiled in 0.1 s for N = 40 and 2 s
  for 100, and parsing alone takes 1 s for 300.
- Each string with a length limit takes about 1.4 s to compile, regardless of its length.
- 64 KiB of EBNF, `choice`, `enum`, `anyOf` or nested objects are parsed in 0.1 s and compiled in half a
  second.

serving.protocols.structure limits the depth of a grammar together with the depth of the request.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from serving.protocols.json_values import count_values
from serving.protocols.refusal import Refusal

MAX_BYTES = 64 * 1024
"""Maximum total size of a request's grammars, serialized as JSON, in bytes."""
MAX_VALUES = 8192
"""Maximum total number of JSON values in a request's grammars. Checking more would block the event loop."""
MAX_PROPERTIES = 500
"""Maximum number of properties per object in a JSON schema."""
MAX_CHOICES_OF_PROPERTIES = 2_000
"""Maximum product of the number of an object's properties and the larger of its `minProperties` and
`maxProperties`."""
MAX_LENGTHS = 32
"""Maximum number of strings with a length limit in the JSON schemas of one request."""
MAX_ATOMS = 1_000
"""Maximum number of atoms (characters and classes) in one pattern, with its repetitions expanded."""
MAX_TOTAL_ATOMS = 10_000

_ATOM = re.compile(r"\\.?|\[(?:\\.|[^\]\\])*\]?|\{(\d+)(?:,(\d*))?\}|\{,(\d+)\}|.", re.DOTALL)
_JSON_TEXTS = ("json", "structural_tag")
_MAX_STEPS = 8 * MAX_ATOMS
"""Maximum number of symbols in a pattern, which guards against thousands of `|` and `?`. These are not atoms, and
a pattern could contain 60,000 of them."""
_OPTIONAL = 20
"""Weight of an optional atom (character or class) in a pattern: it counts as this many atoms."""
_MAX_NUMBER_DIGITS = 6  # a longer number exceeds the limits anyway


def find_excessive_grammar(fields: Mapping[str, Any]) -> Refusal | None:
    """Return a refusal for the first grammar that exceeds a limit, or None if all grammars are within the limits."""
    grammars = {param: grammar for param, grammar in _grammars_of(fields) if grammar is not None}
    if not grammars or not (limit := excess([*grammars.values()])):
        return None
    param = next((param for param, grammar in grammars.items() if excess([grammar])), next(iter(grammars)))
    return Refusal(
        param,
        f"'{param}' is so complex that it would block the engine, which other clients share",
        limit,
        "simplify it",
    )


def _grammars_of(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of every request field that vLLM compiles into a grammar. All routes are covered."""
    for name in ("response_format", "structured_outputs"):
        yield name, fields.get(name)
    for name in ("text", "output_config"):  # of responses, of messages
        outer = fields.get(name)
        yield f"{name}.format", outer.get("format") if isinstance(outer, dict) else None
    tools, choice = fields.get("tools"), fields.get("tool_choice")
    if isinstance(tools, list):
        kind = choice.get("type") if isinstance(choice, dict) else choice
        if kind not in (None, "auto", "none") or any(node.get("strict") for node in _objects(tools, read=False)):
            yield "tools", tools


def excess(grammar: Any) -> str | None:
    """Return a message naming the first limit the grammar exceeds, or None if it is within all limits.

    Args:
        grammar: a JSON value with schemas anywhere in it. Text that is valid JSON is parsed; other text is treated as
            EBNF.
    """
    if count_values(grammar, MAX_VALUES) > MAX_VALUES:
        return f"at most {MAX_VALUES} values"
    if len(json.dumps(grammar)) > MAX_BYTES:
        return f"at most {MAX_BYTES // 1024} KiB"
    lengths = atoms = 0
    for node in _objects(grammar):
        if excessive := _excess_of_properties(node):
            return excessive
        lengths += "maxLength" in node or "minLength" in node
        for pattern in _patterns(node):
            atoms += (size := written_out(pattern))
            if size > MAX_ATOMS:
                return f"a pattern with at most {MAX_ATOMS} characters, counting every repetition"
            if atoms > MAX_TOTAL_ATOMS:
                return f"patterns with at most {MAX_TOTAL_ATOMS} characters in total, counting every repetition"
    return f"at most {MAX_LENGTHS} strings with a length limit" if lengths > MAX_LENGTHS else None


def _excess_of_properties(node: dict[str, Any]) -> str | None:
    properties = node.get("properties")
    if not isinstance(properties, dict):
        return None
    count = len(properties)
    if count > MAX_PROPERTIES:
        return f"at most {MAX_PROPERTIES} properties per object"
    bounds = (node.get(name) for name in ("minProperties", "maxProperties"))
    bound = max((bound for bound in bounds if isinstance(bound, int | float)), default=0)
    if count * min(bound, count) > MAX_CHOICES_OF_PROPERTIES:
        return f"an object whose number of properties times 'maxProperties' is at most {MAX_CHOICES_OF_PROPERTIES}"
    return None


def _patterns(node: dict[str, Any]) -> Iterator[str]:
    for name in ("pattern", "regex", "whitespace_pattern"):
        if isinstance(pattern := node.get(name), str):
            yield pattern
    if isinstance(named := node.get("patternProperties"), dict):
        yield from named


def _objects(grammar: Any, *, read: bool = True) -> Iterator[dict[str, Any]]:
    """Yield all objects in a JSON value, at any depth.

    Args:
        read: whether to parse strings that contain JSON and yield their objects too.
    """
    nodes = [grammar]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            yield node
            nodes += [_read(value) if read and name in _JSON_TEXTS else value for name, value in node.items()]
        elif isinstance(node, list):
            nodes += node


def _read(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None  # vLLM rejects it


def written_out(pattern: str) -> int:
    """Return the number of characters and classes in a regular expression, with bounded repetitions expanded.

    An optional character or class counts as `_OPTIONAL`. Counting stops beyond MAX_ATOMS.
    """
    sums, last = [0], 0  # atoms in each open group, and in the part that a repetition would repeat
    before = ""
    for step, atom in enumerate(_ATOM.finditer(pattern)):
        if bounds := [int(bound[:_MAX_NUMBER_DIGITS]) for bound in atom.groups() if bound]:
            times = max(bounds)
            sums[-1] += last * max(0, times - 1)
            last *= max(1, times)
        elif atom[0] == "(":
            sums.append(0)
        elif atom[0] == ")" and len(sums) > 1:
            last = max(1, sums.pop())
            sums[-1] += last
        elif atom[0] == "?" and before != "(":
            sums[-1] += _OPTIONAL - 1
            last += _OPTIONAL - 1
        elif atom[0] not in "*+?|":
            sums[-1] += 1
            last = 1
        before = atom[0]
        if sums[-1] > MAX_ATOMS or step >= _MAX_STEPS:
            return MAX_ATOMS + 1
    return sum(sums)
