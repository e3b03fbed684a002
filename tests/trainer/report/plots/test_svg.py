"""Tests that figures inherit their colours from the page."""

import re
import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING

import pytest

from trainer.report.plots.svg import WIDTH, Color, draw_svg

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def drawn(label: str = "some", name: str = "test") -> str:
    """Return a figure with one line in each color."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for at, color in enumerate(Color):
            axes.plot([0, 1], [at, at + 1], "o-", color=color.value)
        axes.set_title(label)

    return draw_svg(name, f"{label} of all", 200, draw)


def test_svg_is_well_formed_and_has_the_requested_size() -> None:
    root = ElementTree.fromstring(drawn().replace("xlink:href", "href"))
    assert root.get("viewBox") == f"0 0 {WIDTH} 200"
    assert (root.get("width"), root.get("height")) == (None, None)
    assert (root.get("role"), root.get("aria-label")) == ("img", "some of all")


def test_all_svg_colors_are_css_variables_of_the_page() -> None:
    svg = drawn()
    assert set(re.findall(r"var\(--(\w+)\)", svg)) == {color.name.lower() for color in Color}
    assert re.findall(r"#[0-9a-fA-F]{6}\b", svg) == []


def test_svg_defines_no_styles_and_no_typeface() -> None:
    svg = drawn()
    assert "<style" not in svg
    assert "font-family" not in svg
    assert "DejaVu" not in svg


def test_equal_data_produces_identical_svg_bytes() -> None:
    assert drawn() == drawn()


def test_two_svg_figures_share_no_ids() -> None:
    one, other = (set(re.findall(r'id="([^"]+)"', drawn(name=name))) for name in ("one", "other"))
    assert one
    assert not one & other


@pytest.mark.parametrize("label", ["<script>alert(1)</script>", 'a "b" & c', "$x^{$ costs", "日本語 👩", "a\\frac{b"])
def test_svg_label_is_escaped(label: str) -> None:
    root = ElementTree.fromstring(drawn(label).replace("xlink:href", "href"))
    assert root.get("aria-label") == f"{label} of all"
    assert label in "".join(root.itertext())


def test_double_hyphen_in_a_description_does_not_break_an_svg_comment() -> None:
    assert "a -- b of all" in drawn("a -- b")
