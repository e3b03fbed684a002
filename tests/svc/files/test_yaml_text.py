"""Tests that any text is either parsed to a value or raises ValueError."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.files.yaml_text import parse_yaml


def test_yaml_mapping_is_parsed() -> None:
    assert parse_yaml("a: {b: [1, 2.5, yes]}") == {"a": {"b": [1, 2.5, True]}}


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "2024-13-45",
        "!!bool maybe",
        "!!timestamp x",
        "!!int ''",
        "0b_",
        "9" * 5000,
        "[" * 1500,
        "{[1]: 2}",
        "!!python/name:os.system",
        ":".join("9" * 400) + ".5",
    ],
)
@pytest.mark.slow
def test_invalid_yaml_raises_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_yaml(text)


tags = st.sampled_from(["!!bool ", "!!int ", "!!float ", "!!timestamp ", "!!set ", "!!binary ", "&a ", "*a "])


@given(st.lists(tags | st.text(alphabet="01_:.-xbe{}[],? \n'\"=<#|", max_size=12), max_size=5).map("".join))
def test_any_yaml_text_is_parsed_or_raises_a_value_error(text: str) -> None:
    try:
        parse_yaml(text)
    except Exception as error:  # noqa: BLE001 - the kind is what is tested
        assert isinstance(error, ValueError)  # noqa: PT017
