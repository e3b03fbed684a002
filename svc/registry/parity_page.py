"""A version's parity report as one self-contained HTML page with tables and a plot of the differences."""

from pathlib import Path

from svc.registry.parity import ParityReport

PARITY_PAGE = "parity.html"
"""Name of the parity page in a version's reference folder."""


def parity_page(name: str, report: ParityReport) -> str:
    """Return the parity report as an HTML page.

    Args:
        name: the model's name.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("parity.html.jinja").render(name=name, report=report)
