"""Tests that progress is a bar on a terminal, and a plain line every few seconds in a pipe. Tables lose no text."""

import io
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from rich.console import Console

from svc import terminal
from svc.terminal import advancing, counting, print_table, reading, waiting

PHASES = ("boil water", "brew tea", "drink")
Show = Callable[[bool], io.StringIO]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Show:
    """Return a function that replaces stderr with a terminal or a pipe and returns the text written to it."""

    def shown(is_terminal: bool) -> io.StringIO:
        file = io.StringIO()
        monkeypatch.setattr(terminal, "console", Console(file=file, force_terminal=is_terminal, width=100))
        return file

    return shown


def test_progress_bar_shows_phase_and_count(shown: Show) -> None:
    file = shown(True)
    with advancing("tea", PHASES) as begin:
        begin("brew tea")
    assert "tea: brew tea" in file.getvalue()
    assert "1/3" in file.getvalue()


def test_progress_bar_is_full_at_completion(shown: Show) -> None:
    file = shown(True)
    with advancing("tea", PHASES) as begin:
        begin("drink")
    assert "3/3" in file.getvalue().rpartition("2/3")[2]


def test_piped_output_of_a_short_task_has_only_its_first_and_last_line(shown: Show) -> None:
    file = shown(False)
    with advancing("tea", PHASES) as begin:
        for phase in PHASES:
            begin(phase)
    assert file.getvalue().splitlines() == ["  tea …", "  tea: 0 s"]


def test_piped_output_of_a_long_task_includes_its_phases(shown: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    file = shown(False)
    monkeypatch.setattr(terminal, "_PLAIN_LINE_S", 0.01)
    with advancing("tea", PHASES) as begin:
        begin("brew tea")
        time.sleep(0.1)
    assert "  tea: brew tea, 1/3 after 0 s" in file.getvalue().splitlines()


def test_piped_output_includes_the_final_progress_count(shown: Show) -> None:
    file = shown(False)
    with counting("cups", 3) as advance:
        advance()
        advance()
    assert file.getvalue() == "  cups: 2/3 in 0 s\n"


def test_progress_count_can_advance_by_more_than_one(shown: Show) -> None:
    file = shown(False)
    with counting("cups", 9) as advance:
        advance(4)
        advance(5)
    assert file.getvalue() == "  cups: 9/9 in 0 s\n"


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (lambda: counting("cups", 3), "  cups: 0/3 after 0 s"),
        (lambda: reading("letter", 2_000_000), "  letter: 0 of 2 MB after 0 s"),
        (lambda: waiting("guests"), "  guests: 0 s so far"),
    ],
    ids=["counting", "reading", "waiting"],
)
def test_piped_output_repeats_the_status_line_while_a_step_makes_no_progress(
    shown: Show, monkeypatch: pytest.MonkeyPatch, step: Callable[[], AbstractContextManager[object]], line: str
) -> None:
    file = shown(False)
    monkeypatch.setattr(terminal, "_PLAIN_LINE_S", 0.01)
    with step():
        time.sleep(0.1)
    told = file.getvalue().splitlines()
    assert told.count(line) > 1
    time.sleep(0.05)
    assert file.getvalue().splitlines() == told


@pytest.mark.parametrize("is_terminal", [True, False])
def test_phase_reported_after_the_task_has_ended_is_not_shown(
    shown: Show, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    file = shown(is_terminal)
    monkeypatch.setattr(terminal, "_PLAIN_LINE_S", 0.01)
    with advancing("tea", PHASES) as begin:
        pass
    before = file.getvalue()
    begin("drink")
    time.sleep(0.05)
    assert file.getvalue() == before


def test_failed_task_is_not_displayed_as_completed(shown: Show) -> None:
    file = shown(False)
    with pytest.raises(ValueError, match="cold"), advancing("tea", PHASES):
        raise ValueError("cold")
    assert file.getvalue().splitlines() == ["  tea …"]


def printed(width: int, *row: str) -> list[str]:
    file = io.StringIO()
    print_table(("version", "why"), [row], to=Console(file=file, width=width))
    return [line.strip() for line in file.getvalue().splitlines()]


def test_name_column_of_a_table_is_not_wrapped_if_another_column_can_be() -> None:
    [_, *lines] = printed(40, "debian-triage@1", "a reason of many words that is broken instead")
    assert lines[0].startswith("debian-triage@1  ")
    assert len(lines) > 1


def test_table_text_is_not_truncated_in_a_narrow_terminal() -> None:
    [_, *lines] = printed(24, "debian-triage@1", "insufficient-evidence")
    assert sorted("".join("".join(lines).split())) == sorted("debian-triage@1" + "insufficient-evidence")
