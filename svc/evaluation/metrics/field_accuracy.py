"""JSON answers, field by field: one wrong field of ten is no wrong answer."""

from collections.abc import Iterator
from typing import Any

from svc.evaluation.metrics.metric import Answered, Metric
from svc.evaluation.metrics.valid_json import read_json

_Path = tuple[str | int, ...]


class FieldAccuracy(Metric):
    """Share of the reference's fields that the answer has with the same value, mean over examples.

    A field is a value that holds no other: of objects in objects and of lists each counts. Fields that the reference
    has not cost nothing here: `schema_valid` finds them. An answer that is no JSON has none.
    """

    name = "field_accuracy"
    title = "field accuracy"

    def score(self, answered: Answered) -> list[float]:
        pairs = zip(answered.answers, answered.references, strict=True)
        return [_share(read_json(answer), read_json(reference)) for answer, reference in pairs]


def _share(answer: Any, reference: Any) -> float:
    if answer is None or reference is None:
        return 0.0
    given, right = dict(_fields(answer)), dict(_fields(reference))
    hits = sum(path in given and _equal(given[path], value) for path, value in right.items())
    return hits / len(right)


def _fields(value: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """All values that hold no other, by their path; an object or list without any is a value too."""
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = False
    for key, one in inner:
        found = True
        yield from _fields(one, (*path, key))
    if not found:
        yield path, value


def _equal(one: Any, other: Any) -> bool:
    """Equal in JSON: 1 and 1.0 are, 1 and true are not."""
    return bool(one == other) and isinstance(one, bool) is isinstance(other, bool)
