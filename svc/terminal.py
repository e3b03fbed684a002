"""Human-readable output: text, tables and progress. Results go to stdout and everything else to stderr, so
that a pipe receives only results.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

console = Console(stderr=True, highlight=False)
output = Console(highlight=False)
if not output.is_terminal:
    output.width = 160  # in a pipe or a log, a table is not broken at 80 columns
_PLAIN_LINE_S = 15.0  # without a terminal, a long step prints one line per interval
_PADDING = 2
_TEXT = TextColumn("{task.description}")


def quiet_libraries() -> None:
    """Restrict libraries' logs to warnings or errors, and disable their progress bars. Must be called before the
    libraries are imported.

    Some libraries enable logging for the whole process, HTTP clients log every request, and libraries' progress
    bars interfere with ours.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    for library in ("httpx", "httpcore", "alembic", "uvicorn.error", "tokenicer", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # These warn at import about optional kernels that are not installed and not used here.
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)


def print_table(headers: Sequence[str | Column], rows: Iterable[Sequence[object]], *, to: Console = output) -> None:
    """Print a table of plain text, showing None as an empty cell.

    Names and times are not wrapped if there is enough space. Otherwise, they continue on the next line.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    table = Table(*headers, box=None)
    for row in cells:
        table.add_row(*map(escape, row))
    widths = [_longest_word(column.header, *texts) for column, *texts in zip(table.columns, *cells, strict=True)]
    is_wide = sum(widths) + _PADDING * len(widths) <= to.width
    for column, width in zip(table.columns, widths, strict=True):
        column.min_width, column.no_wrap, column.overflow = width if is_wide else None, False, "fold"
    to.print(table)


def _longest_word(*texts: object) -> int:
    """Return the number of characters in the longest word of the given texts."""
    return max((len(word) for text in texts for word in str(text).split()), default=0)


@contextmanager
def heartbeat(line: Callable[[], str]) -> Iterator[None]:
    """Print a line every 15 s during the `with` block if the output goes to a log. Prints nothing on a
    terminal.

    The lines come from a separate thread, because a step may take minutes without any output.

    Args:
        line: returns the text of the next line.
    """
    if console.is_terminal:
        yield
        return
    ended = threading.Event()

    def print_lines() -> None:
        while not ended.wait(_PLAIN_LINE_S):
            console.print(f"  {line()}", markup=False, soft_wrap=True)

    thread = threading.Thread(target=print_lines, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def counting(text: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar for a known number of steps, and yield a callback that advances it by one step, or by the
    given number of steps.
    """
    started = time.monotonic()
    bar, task = _bar(text, total, SpinnerColumn(), _TEXT, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with bar, heartbeat(lambda: f"{text}: {task.completed:.0f}/{total} after {_since(started)}"):
        yield lambda steps=1: bar.advance(task.id, steps)
    _print_plain(f"{text}: {task.completed:.0f}/{total} in {_since(started)}")


@contextmanager
def reading(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar for bytes during the `with` block, and yield a callback that takes the number of
    bytes read so far.
    """
    started = time.monotonic()
    columns = (SpinnerColumn(), _TEXT, BarColumn(), DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar, task = _bar(text, total, *columns, transient=True)
    with bar, heartbeat(lambda: f"{text}: {task.completed / 1e6:.0f} of {total / 1e6:.0f} MB after {_since(started)}"):
        yield lambda position: bar.update(task.id, completed=position)


@contextmanager
def advancing(text: str, phases: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """Show a progress bar with the elapsed time for a task that has several phases, and yield a callback to call at
    the start of each phase.

    Args:
        phases: names of the phases, in order; the bar shows how many are complete.
    """
    started, count = time.monotonic(), len(phases)
    bar, task = _bar(text, count, _TEXT, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

    def show(phase: str) -> None:
        bar.update(task.id, completed=phases.index(phase), description=f"{text}: {phase}", refresh=True)

    def line() -> str:
        return f"{text}: {phases[int(task.completed)]}, {task.completed:.0f}/{count} after {_since(started)}"

    _print_plain(f"{text} …")
    with bar:
        with heartbeat(line):
            yield show
        bar.update(task.id, completed=count, description=text)
    _print_plain(f"{text}: {_since(started)}")


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a spinner with the elapsed time during a step of unknown length."""
    started = time.monotonic()
    bar, _ = _bar(text, None, SpinnerColumn(), _TEXT, TimeElapsedColumn())
    _print_plain(f"{text} …")
    with bar, heartbeat(lambda: f"{text}: {_since(started)} so far"):
        yield
    _print_plain(f"{text}: {_since(started)}")


def _bar(text: str, total: int | None, *columns: ProgressColumn, transient: bool = False) -> tuple[Progress, Task]:
    """Return a progress bar and its task. Without a terminal the bar is hidden, but the task is still tracked."""
    bar = Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)
    bar.add_task(text, total=total)
    return bar, bar.tasks[0]


def _print_plain(line: str) -> None:
    """Print a line about the start or end of a step if the output goes to a log. Prints nothing on a terminal."""
    if not console.is_terminal:
        console.print(f"  {line}")


def _since(started: float) -> str:
    return f"{time.monotonic() - started:.0f} s"
