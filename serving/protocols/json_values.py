"""How deep a parsed JSON value is, and how much is in it: counted without a Python step for each scalar."""

from collections.abc import Sequence
from typing import Any

CONTAINERS = frozenset({dict, list})


def is_deeper(value: Any, most: int) -> bool:
    """Return whether a value has more than `most` levels of objects and arrays, itself among them."""
    level = [value] if type(value) in CONTAINERS else []
    for _ in range(most):
        level = [inner for container in level for inner in _containers_in(container)]
        if not level:
            return False
    return True


def count_values(value: Any, most: int) -> int:
    """Return how many values are inside of a value, at any depth; counts no further than beyond `most`."""
    count, left = 0, [value]
    while left and count <= most:
        container = left.pop()
        if type(container) in CONTAINERS:
            count += len(container)
            left += _containers_in(container)
    return count


def _containers_in(container: Any) -> Sequence[Any]:
    inside = container.values() if type(container) is dict else container
    if CONTAINERS.isdisjoint(map(type, inside)):
        return ()
    return [each for each in inside if type(each) in CONTAINERS]
