"""Tests that NAME@N is parsed and similar texts are rejected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.errors import NotFoundError
from svc.version import NAME_PATTERN, VersionId


def test_printed_version_id_round_trips() -> None:
    assert VersionId.parse("my-model.v2@17") == VersionId("my-model.v2", 17)
    assert str(VersionId("my-model.v2", 17)) == "my-model.v2@17"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "@1",
        "a@",
        "a@0",
        "a@01",
        "a@-1",
        "a@1.0",
        "a@one",
        "a@1@2",
        "a@production",
        "A@1",
        ".a@1",
        "../a@1",
        "a/b@1",
        "a@1\n",
        "a\n@1",
        " a@1",
        "a@1 ",
        "a@٣",
        "a@²",
        "a@1234567890",
        "a" * 64 + "@1",
    ],
)
def test_error_for_an_invalid_version_id_shows_the_expected_format(text: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        VersionId.parse(text)
    assert repr(text) in caught.value.wrong
    assert "NAME@N" in caught.value.expected


@given(st.text() | st.from_regex(r"\A[a-z0-9._-]{1,5}@\d{1,4}\Z"))
def test_arbitrary_text_is_either_rejected_as_a_version_id_or_round_trips(text: str) -> None:
    try:
        version = VersionId.parse(text)
    except NotFoundError:
        return
    assert str(version) == text
    assert version.number >= 1


@given(st.from_regex(NAME_PATTERN, fullmatch=True).filter(lambda name: "\n" not in name), st.integers(1, 999_999_999))
def test_every_possible_version_id_round_trips(name: str, number: int) -> None:
    version = VersionId(name, number)
    assert VersionId.parse(str(version)) == version


def test_versions_are_ordered_numerically() -> None:
    assert VersionId("a", 9) < VersionId("a", 10) < VersionId("b", 1)
