"""Lists the types of errors."""

from collections.abc import Iterator

from svc import errors
from svc.errors import SvcError


def kinds(root: type[SvcError] = SvcError) -> Iterator[type[SvcError]]:
    """Yield all subclasses of an error that svc/errors.py defines. Other packages define more."""
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield kind
            yield from kinds(kind)
