"""What a grammar of a request may take of the engine that all clients share: its JSON schemas and regular expressions.

vLLM reads a grammar in the loop that also answers all others and the health check, and compiles it beside, on threads
that take processors from them. The limits are from measurements of xgrammar 0.2.8 with a vocabulary of 49,000 tokens,
on a machine with two cores:

- A pattern `[a-z]{0,N}` is read in 0.03 s for N = 500, 0.1 for 1,000, 1.7 for 4,000, and in more than 20 for 10,000.
  Nested, `([a-z]{0,N},){0,N}` is compiled in 2 s for N = 30 and in more than 8 for 60; N times `[a-z]?` in 0.5 s for
  N = 25, 3 for 50 and more than 6 for 100.
- An object of N optional properties is compiled in 0.3 s for N = 300, 0.9 for 500, 3.5 for 1,000 and more than 20 for
  3,000; where `maxProperties` is half of them, in 0.1 for 40, 2 for 100, and for 300 it is read in 1 s alone.
- Each length of strings takes about 1.4 s to compile, however long.
- Of EBNF, `choice`, `enum`, `anyOf` and nested objects 64 KiB are read in 0.1 s and compiled in half a second.

The depth of a grammar is limited with that of the whole request, by serving.protocols.structure.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from serving.protocols.json_values import count_values
from serving.protocols.refusal import Refusal

MOST_BYTES = 64 * 1024
"""Of all grammars of a request, as JSON."""
MOST_VALUES = 8192
"""Of all grammars of a request; to check more would hold the event loop."""
MOST_PROPERTIES = 500
"""Of one object."""
MOST_CHOICES_OF_PROPERTIES = 2_000
"""Properties of an object times as many of them as `minProperties` or `maxProperties` let it have."""
MOST_LENGTHS = 32
"""Strings with a length, in a request."""
MOST_ATOMS = 1_000
"""Of one pattern, with its repetitions written out."""
MOST_ATOMS_TOGETHER = 10_000

_ATOM = re.compile(r"\\.?|\[(?:\\.|[^\]\\])*\]?|\{(\d+)(?:,(\d*))?\}|\{,(\d+)\}|.", re.DOTALL)
_JSON_TEXTS = ("json", "structural_tag")
_MAX_STEPS = 8 * MOST_ATOMS
"""Of reading a pattern: `|` and `?` are no atoms, and there could be 60,000 of them."""
_OPTIONAL = 20
"""As many atoms an optional part counts for."""
_LONGEST_NUMBER = 6  # digits; more are as good as these


def find_excessive_grammar(fields: Mapping[str, Any]) -> Refusal | None:
    """Return the first grammar of a request that is beyond a limit; None where all together are within the limits."""
    grammars = {param: grammar for param, grammar in _grammars_of(fields) if grammar is not None}
    if not grammars or not (limit := excess([*grammars.values()])):
        return None
    param = next((param for param, grammar in grammars.items() if excess([grammar])), next(iter(grammars)))
    return Refusal(param, f"'{param}' would keep the engine busy, which other clients share", limit, "make it simpler")


def _grammars_of(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every field that vLLM makes a grammar of, on whichever route."""
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
    """Return the limit that a grammar is beyond, in words; None where it is within all.

    Args:
        grammar: a JSON value with schemas anywhere in it; text that is JSON is read, other text is EBNF.
    """
    if count_values(grammar, MOST_VALUES) > MOST_VALUES:
        return f"at most {MOST_VALUES} values"
    if len(json.dumps(grammar)) > MOST_BYTES:
        return f"at most {MOST_BYTES // 1024} KiB"
    lengths = atoms = 0
    for node in _objects(grammar):
        if excessive := _excess_of_properties(node):
            return excessive
        lengths += "maxLength" in node or "minLength" in node
        for pattern in _patterns(node):
            atoms += (size := written_out(pattern))
            if size > MOST_ATOMS:
                return f"a pattern of at most {MOST_ATOMS} characters with its repetitions written out"
            if atoms > MOST_ATOMS_TOGETHER:
                return f"patterns of at most {MOST_ATOMS_TOGETHER} characters in all"
    return f"at most {MOST_LENGTHS} strings with a length" if lengths > MOST_LENGTHS else None


def _excess_of_properties(node: dict[str, Any]) -> str | None:
    properties = node.get("properties")
    if not isinstance(properties, dict):
        return None
    count = len(properties)
    if count > MOST_PROPERTIES:
        return f"at most {MOST_PROPERTIES} properties of an object"
    bounds = (node.get(name) for name in ("minProperties", "maxProperties"))
    most = max((bound for bound in bounds if isinstance(bound, int | float)), default=0)
    if count * min(most, count) > MOST_CHOICES_OF_PROPERTIES:
        return f"properties of an object times 'maxProperties' at most {MOST_CHOICES_OF_PROPERTIES}"
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
        read: also those in text that is JSON itself.
    """
    left = [grammar]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            yield node
            left += [_read(value) if read and name in _JSON_TEXTS else value for name, value in node.items()]
        elif isinstance(node, list):
            left += node


def _read(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None  # vLLM refuses it


def written_out(pattern: str) -> int:
    """Return how many characters and classes a regular expression has with its bounded repetitions written out.

    An optional part counts for many. Counts no further than to what is too many.
    """
    sums, last = [0], 0  # of each open group; of what a repetition would repeat
    before = ""
    for step, atom in enumerate(_ATOM.finditer(pattern)):
        if bounds := [int(bound[:_LONGEST_NUMBER]) for bound in atom.groups() if bound]:
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
        if sums[-1] > MOST_ATOMS or step >= _MAX_STEPS:
            return MOST_ATOMS + 1
    return sum(sums)
