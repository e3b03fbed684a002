"""Tests the parity report as metrics, as a page and as command output."""

import math
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from svc.registry.parity import Differences
from svc.registry.parity_page import parity_page
from tests.svc.registry.parity import make_parity

nats = st.lists(st.lists(st.floats(-20, 20), min_size=1, max_size=5).map(tuple), min_size=1, max_size=4).map(tuple)


@given(nats)
def test_parity_differences_are_computed_over_all_tokens(found: tuple[tuple[float, ...], ...]) -> None:
    differences = Differences(nats=found, agreement=1.0, diverges_at=None)
    tokens = [one for example in found for one in example]
    assert math.isclose(differences.mean, sum(map(abs, tokens)) / len(tokens), abs_tol=1e-9)
    assert differences.largest == max(map(abs, tokens))
    assert math.isclose(differences.shift, -sum(tokens) / len(tokens), abs_tol=1e-9)


def test_failed_parity_checks_are_reported_with_their_values() -> None:
    assert make_parity().failed == ()
    assert make_parity("template").failed == ("template: <other>, expected the base's",)


class Page(HTMLParser):
    """A parser that counts a page's elements and external resources."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.dots = 0
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.dots += tag == "circle"
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_parity_page_is_self_contained_and_shows_every_token() -> None:
    page = Page(parity_page("tiny", make_parity()))
    assert (page.dots, page.fetched) == (3, [])
    assert "All 1 checks passed" in "".join(page.words)


def test_parity_page_reports_failed_checks_and_escapes_html() -> None:
    text = parity_page("<b>tiny</b>", make_parity("template"))
    assert "<b>tiny</b>" not in text
    page = Page(text)
    assert "1 of 2 checks failed" in "".join(page.words)
    assert "<other>" in page.words
