"""Draws matplotlib figures as SVG that inherits colors and typeface from the surrounding page.

The same figure therefore works in light, dark and print styles. For each color role, such as text or grid lines,
matplotlib is given a placeholder color, and the page's stylesheet defines the actual color. This module does not know
what is drawn.
"""

import io
import logging
import re
import warnings
from collections.abc import Callable
from enum import StrEnum
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 400
"""Width of every figure, in SVG units; the font size is 12 of these units. On a desktop, two figures fit side by side;
on a phone, one figure fills the width of the screen."""
_FONT = 12


class Color(StrEnum):
    """A color role and its placeholder color in matplotlib. The page's CSS variable has the role's name."""

    INK = "#010101"
    MUTED = "#010102"
    LINE = "#010103"
    BASE = "#010104"
    MERGED = "#010105"
    GPTQ = "#010106"
    INT8 = "#010107"
    FP8 = "#010108"
    AWQ = "#010109"


_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": Color.LINE.value,
    "axes.grid": True,
    "axes.labelcolor": Color.MUTED.value,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": _FONT,
    "grid.color": Color.LINE.value,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": Color.INK.value,
    "path.simplify_threshold": 1.0,  # a curve of 50,000 steps takes 37 kB
    "svg.fonttype": "none",
    "text.color": Color.INK.value,
    "text.parse_math": False,  # labels may contain dollar signs
    "xtick.color": Color.LINE.value,
    "xtick.labelcolor": Color.MUTED.value,
    "ytick.color": Color.LINE.value,
    "ytick.labelcolor": Color.MUTED.value,
}


def draw_svg(name: str, description: str, height: float, draw: Callable[["Figure"], None]) -> str:
    """Return a figure as an `<svg>` element. The same data always produces the same bytes.

    Args:
        name: name of the figure, unique on its page.
        description: text alternative for screen readers.
        height: height of the figure, in the same unit as `WIDTH`.
        draw: function that adds axes to an empty figure.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # else it logs the creation of its font cache
    import matplotlib
    from matplotlib.figure import Figure

    output = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fonts that lack a letter: the browser has other fonts
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        draw(figure)
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(output, format="svg", transparent=True, metadata=no_metadata)
    return _for_page(output.getvalue(), description, height)


def _for_page(svg: str, description: str, height: float) -> str:
    """Return the SVG adapted to its page, without its own size, ids, typefaces and style rules."""
    body = svg[svg.index("<defs>", svg.index("<svg")) :]
    body = re.sub(r"<style.*?</style>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r' id="[a-zA-Z0-9.]+_[0-9_]+"', "", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub("<!--.*?-->", "", body, flags=re.DOTALL)
    for color in Color:
        body = body.replace(color.value, f"var(--{color.name.lower()})")
    head = f'<svg class="plot" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(description)}">'
    return head + body
