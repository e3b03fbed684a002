"""The headers of a request by their name, put together once: several layers look for theirs."""

from collections.abc import Mapping

from starlette.types import Scope

_HEADERS = "headers"


def headers_of(scope: Scope) -> Mapping[bytes, bytes]:
    """By their names in lower case; of two of a name the first.

    Args:
        scope: of the request; what was found is kept in its state.
    """
    state = scope.setdefault("state", {})
    found: Mapping[bytes, bytes] | None = state.get(_HEADERS)
    if found is None:
        found = state[_HEADERS] = dict(reversed(scope["headers"]))
    return found
