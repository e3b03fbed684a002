"""Lists the project's documentation pages and provides helpers that read them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])


def page_id(page: Path) -> str:
    """Return a page's id for use in test names."""
    return str(page.relative_to(ROOT))


def read(path: str) -> str:
    """Return a page's text by its path relative to the repository root."""
    return (ROOT / path).read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced code blocks of the given language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """Return the text without its fenced code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def rows(text: str, header: str) -> list[list[str]]:
    """Return the cell texts of all tables whose header begins with these columns."""
    cells = []
    for table in re.findall(rf"^\| {re.escape(header)} \|.*\n\|[ -|]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        cells += [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return cells
