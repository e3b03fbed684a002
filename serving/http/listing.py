"""Lists and times in the format of OpenAI's API: the query parameters `after`, `limit` and `order`, list objects, and
Unix timestamps."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from starlette.requests import Request

from serving.http.page import Page
from serving.protocols.request import InvalidRequestError

_NEWEST_FIRST = {"desc": True, "asc": False}
_MAX_DIGITS = 9


def requested_page(request: Request, *, max_limit: int, default_limit: int) -> Page:
    """Return the page that a request's query parameters select. The default is the first page, newest row first.

    An empty parameter counts as absent.

    Args:
        max_limit: maximum number of objects in a page.
        default_limit: number of objects if the request has no `limit`.

    Raises:
        InvalidRequestError: a parameter has an invalid value.
    """
    limit, order = request.query_params.get("limit") or str(default_limit), request.query_params.get("order") or "desc"
    if not (limit.isdecimal() and len(limit) <= _MAX_DIGITS and 1 <= int(limit) <= max_limit):
        raise _invalid("limit", limit, f"a number from 1 to {max_limit}")
    if order not in _NEWEST_FIRST:
        raise _invalid("order", order, " or ".join(repr(value) for value in _NEWEST_FIRST))
    return Page(int(limit), request.query_params.get("after") or None, newest_first=_NEWEST_FIRST[order])


def list_object(objects: Sequence[Mapping[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """Return the object that contains one page of a list.

    Args:
        objects: the page's objects, each with an `id`.
        has_more: whether more objects follow.
    """
    return {
        "object": "list",
        "data": list(objects),
        "first_id": objects[0]["id"] if objects else None,
        "last_id": objects[-1]["id"] if objects else None,
        "has_more": has_more,
    }


def unix_seconds(moment: datetime | None) -> int | None:
    """Return a time as a Unix timestamp in whole seconds, or None if the argument is None."""
    return None if moment is None else int(moment.timestamp())


def _invalid(name: str, value: str, expected: str) -> InvalidRequestError:
    return InvalidRequestError(f"{value[:100]!r} is not a valid value of {name!r}", param=name, expected=expected)
