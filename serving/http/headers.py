"""The headers of a request by their name, put together once: several layers look for theirs."""

from collections.abc import Mapping
from typing import cast

from starlette.types import Scope

_HEADERS = "headers"


def headers_of(scope: Scope) -> Mapping[bytes, bytes]:
    """By their names in lower case; of two of a name the first.

    Args:
        scope: of the request; what was found is kept in its state.
    """
    try:
        return cast(Mapping[bytes, bytes], scope["state"][_HEADERS])
    except KeyError:
        found = dict(reversed(scope["headers"]))
        scope.setdefault("state", {})[_HEADERS] = found
        return found
