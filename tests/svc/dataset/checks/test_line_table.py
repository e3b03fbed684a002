"""Tests the facts that are stored about each example."""

from svc.dataset.checks.line_table import LineTableBuilder
from tests.svc.chats import chat


def test_line_table_supports_more_than_65535_files() -> None:
    builder = LineTableBuilder()
    builder.add(70_000, 5, chat())
    [row] = builder.finish().rows
    assert (row["files"], row["lines"]) == (70_000, 5)
