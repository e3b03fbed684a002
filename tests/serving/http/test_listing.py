"""Tests of the query parameters and the object of lists."""

import pytest
from openai.pagination import SyncCursorPage
from openai.types import FileObject
from starlette.requests import Request

from serving.http.listing import list_object, requested_page
from serving.http.page import Page
from serving.protocols.request import InvalidRequestError


def request(query: str) -> Request:
    return Request({"type": "http", "headers": [], "query_string": query.encode()})


def page(query: str) -> Page:
    return requested_page(request(query), max_limit=100, default_limit=20)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", Page(20)),
        ("limit=&after=&order=", Page(20)),
        ("limit=1&after=file-1&order=asc", Page(1, "file-1", newest_first=False)),
        ("limit=100&order=desc", Page(100)),
    ],
)
def test_valid_pagination_parameters_are_parsed(query: str, expected: Page) -> None:
    assert page(query) == expected


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=-1", "limit"),
        ("limit=1.5", "limit"),
        ("limit=\u00b2", "limit"),
        (f"limit={'1' * 5000}", "limit"),
        ("order=newest", "order"),
    ],
)
def test_error_names_the_parameter_when_its_value_is_invalid(query: str, param: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"not a valid value of '{param}'") as caught:
        page(query)
    assert caught.value.param == param


def test_list_response_is_valid_for_the_official_client() -> None:
    file = {
        "id": "file-1",
        "object": "file",
        "bytes": 1,
        "created_at": 1,
        "filename": "a.jsonl",
        "purpose": "fine-tune",
        "status": "processed",
    }
    parsed = SyncCursorPage[FileObject].model_validate(list_object([file, file | {"id": "file-2"}], has_more=True))
    assert [each.id for each in parsed.data] == ["file-1", "file-2"]
    assert parsed.has_more is True


def test_empty_list_response_has_no_first_or_last_id() -> None:
    assert list_object([], has_more=False) == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
