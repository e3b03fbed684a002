"""Measures the depth and size of a parsed JSON value, without running Python code for each scalar."""

from collections.abc import Sequence
from typing import Any

CONTAINERS = frozenset({dict, list})


def is_deeper(value: Any, most: int) -> bool:
    """Return whether objects and arrays are nested more than `most` levels deep, counting the value itself."""
    level = [value] if type(value) in CONTAINERS else []
    for _ in range(most):
        level = [inner for container in level for inner in _containers_in(container)]
        if not level:
            return False
    return True


def count_values(value: Any, most: int) -> int:
    """Return the number of values nested in a JSON value, at any depth. Counting stops beyond `most`."""
    count, pending = 0, [value]
    while pending and count <= most:
        container = pending.pop()
        if type(container) in CONTAINERS:
            count += len(container)
            pending += _containers_in(container)
    return count


def _containers_in(container: Any) -> Sequence[Any]:
    inside = container.values() if type(container) is dict else container
    if CONTAINERS.isdisjoint(map(type, inside)):
        return ()
    return [each for each in inside if type(each) in CONTAINERS]
