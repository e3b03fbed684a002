"""Draws a figure with matplotlib as SVG that takes its colours and its typeface from the page around it.

So one figure does for light, dark and print: matplotlib is given a colour that stands for a role, and the page's
stylesheet says what that role looks like. Knows nothing of what is drawn.
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
"""Of every figure, in units of which a letter has 12: two are side by side on a desktop, one fills a phone."""
_FONT = 12


class Colour(StrEnum):
    """A role, as the colour that stands for it in matplotlib; the page's variable has the role's name."""

    INK = "#010101"
    MUTED = "#010102"
    LINE = "#010103"
    BASE = "#010104"
    MERGED = "#010105"
    GPTQ = "#010106"


_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": Colour.LINE.value,
    "axes.grid": True,
    "axes.labelcolor": Colour.MUTED.value,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": _FONT,
    "grid.color": Colour.LINE.value,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": Colour.INK.value,
    "path.simplify_threshold": 1.0,  # a curve of 50,000 steps takes 37 kB
    "svg.fonttype": "none",
    "text.color": Colour.INK.value,
    "text.parse_math": False,  # a label may hold dollar signs
    "xtick.color": Colour.LINE.value,
    "xtick.labelcolor": Colour.MUTED.value,
    "ytick.color": Colour.LINE.value,
    "ytick.labelcolor": Colour.MUTED.value,
}


def draw_svg(name: str, description: str, height: float, draw: Callable[["Figure"], None]) -> str:
    """One figure as an `<svg>` element, the same bytes for the same data.

    Args:
        name: of the figure, unlike that of any other on its page.
        description: what it shows, for who cannot see it.
        height: in units of `WIDTH`.
        draw: puts axes into an empty figure.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells when it makes a cache of fonts
    import matplotlib
    from matplotlib.figure import Figure

    written = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fonts that lack a letter: the browser has others
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    return _for_page(written.getvalue(), description, height)


def _for_page(svg: str, description: str, height: float) -> str:
    """Without a size, ids, typefaces and rules of its own."""
    body = svg[svg.index("<defs>", svg.index("<svg")) :]
    body = re.sub(r"<style.*?</style>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r' id="[a-zA-Z0-9.]+_[0-9_]+"', "", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub("<!--.*?-->", "", body, flags=re.DOTALL)
    for colour in Colour:
        body = body.replace(colour.value, f"var(--{colour.name.lower()})")
    head = f'<svg class="plot" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(description)}">'
    return head + body
