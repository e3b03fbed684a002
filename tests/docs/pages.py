"""The project's pages, and what tests read out of them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])


def page_id(page: Path) -> str:
    """A page's path as a test's name shows it."""
    return str(page.relative_to(ROOT))


def read(path: str) -> str:
    """A page by its path from the root."""
    return (ROOT / path).read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose header line begins so, in every place where it stands."""
    found = []
    for table in re.findall(rf"^\| {re.escape(header)} \|.*\n\|[ -|]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        found += [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return found
