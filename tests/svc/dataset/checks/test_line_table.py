"""What is remembered of each example."""

from svc.dataset.checks.line_table import LineTableBuilder
from tests.svc.chats import chat


def test_any_number_of_files_has_a_place() -> None:
    builder = LineTableBuilder()
    builder.add(70_000, 5, chat())
    table = builder.finish()
    assert (int(table.files[0]), int(table.lines[0])) == (70_000, 5)
