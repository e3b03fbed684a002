"""Tests that a chat template renders the same prompt on any day."""

from importlib.resources import files

import pytest

from svc.model_folder.chat_template import pin_date

SMOLLM3 = """{%- set today = strftime_now("%d %B %Y") -%}{{- "Today Date: " ~ today ~ "\\n" -}}"""


@pytest.mark.parametrize(
    ("template", "pinned"),
    [
        (SMOLLM3, SMOLLM3.replace('strftime_now("%d %B %Y")', '"26 July 2024"')),
        ("{{ strftime_now( '%Y-%m-%d' ) }}", '{{ "2024-07-26" }}'),
        ("{{ messages }}", "{{ messages }}"),
    ],
)
def test_current_date_in_a_chat_template_is_replaced_by_a_fixed_date(template: str, pinned: str) -> None:
    assert pin_date(template) == pinned


@pytest.mark.slow
def test_chat_template_that_accepts_the_date_as_an_argument_is_unchanged() -> None:
    template = files("trl.chat_templates").joinpath("llama3_2.jinja").read_text("utf-8")
    assert "strftime_now" in template
    assert pin_date(template) == template
